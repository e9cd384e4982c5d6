"""A command line as people type it who know other programs' flags.

    --max_seq_length 2048       another program's name: --max-length 2048
    --batch_size=4              underscores: --batch-size=4
    --packing true              a value behind a switch: --packing; false: --no-packing
    --bf16                      a flag that is ours with a value: --dtype bfloat16
    --text-field body           a flag whose value is a part of ours: --fields text=body
    --leraning-rate 1e-4        one line: did you mean --learning-rate?

A name that is ours as it stands is never translated.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from foreign.terminal import one_line

TRUTHS = {"true": True, "false": False}


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are a line, and which understands names of others."""

    def __init__(
        self,
        *args: Any,
        also: Mapping[str, str] | None = None,
        elsewhere: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make a command line without abbreviations.

        Args:
            also: other names of flags, with hyphens: each with ours, or with ours and a value
                ("--bf16": "--dtype bfloat16"), which takes no other, or with ours and the
                beginning of a value ("--text-field": "--fields text=").
            elsewhere: flags of other programs that have no like here, each with what to do.
        """
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self._also, self._elsewhere = also or {}, elsewhere or {}

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Read the command line; what it cannot be is said in a line, and ends the process."""
        given = sys.argv[1:] if args is None else args
        found, unknown = self.parse_known_args([*self._in_our_words([*given])], namespace)
        if unknown:
            self.error(self._describe(unknown[0]))
        return found

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, without the page of usage that would push it off the screen."""
        self.exit(2, f"error: {one_line(message)}; {self.prog} --help lists all flags\n")

    def _in_our_words(self, given: list[str]) -> Iterator[str]:
        """Translate arguments one by one."""
        while given:
            argument = given.pop(0)
            if not argument.startswith("--") or argument == "--":
                yield argument
                continue
            typed, equals, value = argument.partition("=")
            name = self._name_of(typed)
            if name in self._elsewhere and name not in self._option_string_actions:
                self.error(f"{typed} is another program's: {self._elsewhere[name]}")
            ours, _, fixed = self._also.get(name, name).partition(" ")
            if ours not in self._option_string_actions:
                # as it was typed, to be told so
                yield argument
                continue
            if fixed.endswith("="):
                yield ours
                if equals or (given and not given[0].startswith("--")):
                    yield fixed + (value if equals else given.pop(0))
                continue
            if not fixed and not self._is_switch(ours):
                yield ours + equals + value
                continue
            if not equals and given and given[0].lower() in TRUTHS:
                equals, value = "=", given.pop(0)
            if equals and value.lower() not in TRUTHS:
                self.error(f"{typed} must be left bare, or be true or false: got {value!r}")
            is_on = TRUTHS[value.lower()] if equals else True
            if fixed and not is_on:
                self.error(f"{typed} false says only what not to do: give {ours} and what to do")
            if fixed:
                yield from (ours, fixed)
            else:
                yield ours if is_on else self._opposite(typed, ours)

    def _name_of(self, typed: str) -> str:
        """Write a name with hyphens, unless it is a flag as it stands."""
        known = self._option_string_actions
        return typed if typed in known else typed.replace("_", "-")

    def _is_switch(self, name: str) -> bool:
        action = self._option_string_actions.get(name)
        kinds = (argparse.BooleanOptionalAction, argparse._StoreTrueAction)
        return isinstance(action, kinds)

    def _opposite(self, typed: str, name: str) -> str:
        """Name the flag that switches another one off."""
        opposite = (
            name.replace("--no-", "--", 1) if name.startswith("--no-") else f"--no-{name[2:]}"
        )
        if opposite not in self._option_string_actions:
            self.error(f"{typed} false is how it is without the flag: leave it out")
        return opposite

    def _describe(self, unknown: str) -> str:
        """Say that an argument is unknown, and what it may have been meant to be."""
        if not unknown.startswith("-"):
            return f"arguments must begin with a flag's name: got {unknown!r}"
        name = self._name_of(unknown.partition("=")[0])
        known = [*self._option_string_actions, *self._also]
        near = get_close_matches(name, known, n=1, cutoff=0.7)
        meant = self._also.get(near[0], near[0]) if near else ""
        return f"there is no flag {unknown}" + (f": did you mean {meant}?" if near else "")
