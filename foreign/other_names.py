"""Arguments in the words of other programs, translated into ours.

    --max_seq_length 2048       another program's name: --max-length 2048
    --batch_size=4              underscores: --batch-size=4
    --packing true              a value behind a switch: --packing; false: --no-packing
    --bf16                      a flag that is ours with a value: --dtype bfloat16
    --text-field body           a flag whose value is a part of ours: --fields text=body
    --save-strategy epoch       a value that is ours with another name: --save-steps epoch
    --bf16 true --fp16 false    says once what is meant: --dtype bfloat16

A name that is ours as it stands is never translated. Two names of one flag must agree; a name that
is given twice means its last value, as everywhere.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

# YAML 1.1 has the six, in files that other programs read
TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Translation:
    """The translation of one command line.

    Attributes:
        complaints: a sentence for each argument that is wrong, in their order; it begins with the
            name as it was typed.
    """

    def __init__(
        self,
        flags: Mapping[str, bool],
        also: Mapping[str, str],
        elsewhere: Mapping[str, str],
    ) -> None:
        """Know the words.

        Args:
            flags: our flags, and whether each is a switch.
            also: other names, with hyphens: each with our flag, or with our flag and a value, which
                takes no other, or with our flag and the beginning of a value ("--text-field":
                "--fields text="). A name may have a value, too ("--save-strategy no": "--save-steps
                0"). Such a name, which may be ours, may stand for nothing, which says how it is
                anyway, or for a flag without a value, which must then be given.
            elsewhere: flags of other programs that have no like here, each with what to do.
        """
        self._flags, self._also, self._elsewhere = flags, also, elsewhere
        # by our flag: the name and the value that were typed
        self._given: dict[str, tuple[str, str]] = {}
        # by our flag, which must be given, too: the name that needs it
        self._needed: dict[str, tuple[str, str]] = {}
        self.complaints: list[str] = []

    def translate(self, arguments: Sequence[str]) -> list[str]:
        """Translate all arguments, and leave out those that there is a complaint about: a name that
        nobody knows or that is another program's, a switch whose value is no truth, two names of
        one flag that contradict each other."""
        rest, words = [*arguments], []
        while rest:
            argument = rest.pop(0)
            is_flag = argument.startswith("--") and argument != "--"
            try:
                words += self._words_of(argument, rest) if is_flag else [argument]
            except ValueError as error:
                self.complaints.append(str(error))
        for ours, (name, value) in self._needed.items():
            if ours not in self._given:
                lacks = f"{name} {value} does not say enough: give {ours}, too"
                self.complaints.append(lacks if name != ours else f"{name} must have a value")
                continue
            # what the name stands for with another value
            others = {words for key, words in self._also.items() if key.split()[0] == name}
            if f"{ours} {self._given[ours][1]}" in others:
                self.complaints.append(self._contradiction((name, value), self._given[ours]))
        return words

    def _words_of(self, argument: str, rest: list[str]) -> list[str]:
        """Translate a flag, and take the value that follows it where our words have it in them."""
        typed, equals, value = argument.partition("=")
        name = typed if typed in self._flags else typed.replace("_", "-")
        follows = not equals and bool(rest) and not rest[0].startswith("--")
        value = rest[0] if follows else value if equals else "true"
        special = self._special(name, value)
        if special is not None or name in self._elsewhere:
            del rest[: int(follows)]
        if special is not None:
            ours, _, fixed = special.partition(" ")
            return self._fixed(ours, fixed, name, value) if special else []
        if name in self._elsewhere:
            raise ValueError(f"{typed}: {self._elsewhere[name]}")
        ours, _, fixed = self._also.get(name, name).partition(" ")
        if ours not in self._flags:
            del rest[: int(follows)]
            raise ValueError(self._unknown(typed))
        if fixed.endswith("=") and (equals or follows):
            del rest[: int(follows)]
            return self._fixed(ours, fixed + value, name, value)
        if not self._flags[ours] and (not fixed or fixed.endswith("=")):
            self._note(ours, name, value)
            return [ours + equals + value] if equals else [ours]
        if follows and value.lower() in TRUTHS:
            del rest[0]
        elif follows:
            value = "true"
        if value.lower() not in TRUTHS:
            raise ValueError(f"{typed} must be left bare, or be true or false: got {value!r}")
        is_on = TRUTHS[value.lower()]
        if fixed:
            return self._fixed(ours, fixed if is_on else "", name, value)
        negates = ours.startswith("--no-")
        positive = ours.replace("--no-", "--", 1) if negates else ours
        self._note(positive, name.replace("--no-", "--", 1), str(is_on != negates))
        return [ours if is_on else self._opposite(typed, ours)]

    def _unknown(self, typed: str) -> str:
        """Say that a name is unknown, and what it may have been meant to be."""
        known = [*self._flags, *(name.split()[0] for name in self._also)]
        near = get_close_matches(typed.replace("_", "-"), known, n=1, cutoff=0.7)
        meant = self._also.get(near[0], near[0]) if near else ""
        return f"{typed} is unknown" + (f": did you mean {meant}?" if meant else "")

    def _special(self, name: str, value: str) -> str | None:
        """Find what a name stands for with a value, of which only a truth may be written in other
        ways."""
        exact = self._also.get(f"{name} {value}")
        if exact is not None or value.lower() not in TRUTHS:
            return exact
        return self._also.get(f"{name} {str(TRUTHS[value.lower()]).lower()}")

    def _fixed(self, ours: str, fixed: str, name: str, value: str) -> list[str]:
        """Our flag with its value; without a value, the flag is needed beside the name."""
        if not fixed:
            self._needed[ours] = (name, value)
            return []
        self._note(ours, name, fixed)
        return [ours, fixed]

    def _note(self, ours: str, name: str, value: str) -> None:
        """Keep what a flag was given, and complain of another value under another name."""
        first = self._given.get(ours, (name, value))
        if first[0] != name and first[1] != value:
            self.complaints.append(self._contradiction(first, (name, value)))
        self._given[ours] = (name, value)

    def _contradiction(self, first: tuple[str, str], second: tuple[str, str]) -> str:
        pairs = " and ".join(f"{name} ({value})" for name, value in (first, second))
        return f"{pairs} contradict each other: give one of them"

    def _opposite(self, typed: str, name: str) -> str:
        """Name the flag that switches another one off."""
        opposite = (
            name.replace("--no-", "--", 1) if name.startswith("--no-") else f"--no-{name[2:]}"
        )
        if opposite not in self._flags:
            raise ValueError(f"{typed} false is how it is without the flag: leave it out")
        return opposite
