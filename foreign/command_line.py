"""A command line for people who know other programs' flags (foreign/other_names.py).

An error is a line, and names the flag that may have been meant:

    --leraning-rate 1e-4        --leraning-rate is unknown: did you mean --learning-rate?

Several errors are a list with a line for each, so a command or a file is put right in one go. A
file of settings is read by the same code, as a command line of all its settings.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from foreign.other_names import Translation
from foreign.terminal import Complaints, printable


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are a line, and which understands names of others."""

    def __init__(
        self,
        *args: Any,
        also: Mapping[str, str] | None = None,
        elsewhere: Mapping[str, str] | None = None,
        file: Path | None = None,
        **kwargs: Any,
    ) -> None:
        """Make a command line without abbreviations.

        Args:
            also, elsewhere: as Translation.
            file: where the arguments are from, if not from a command line.
        """
        super().__init__(*args, allow_abbrev=False, add_help=file is None, **kwargs)
        self._also, self._elsewhere, self._file = also or {}, elsewhere or {}, file
        self._complaints: list[str] = []

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Read the arguments; what a command line cannot be ends the process with a message.

        Raises:
            ValueError: arguments of a file are not what they must be.
        """
        given = sys.argv[1:] if args is None else args
        flags = {name: self._is_switch(name) for name in self._option_string_actions}
        translation = Translation(flags, self._also, self._elsewhere)
        self._complaints = translation.complaints
        found, unknown = self.parse_known_args(translation.translate(given), namespace)
        if unknown:
            self._complaints.append(f"arguments must begin with a flag's name: got {unknown[0]!r}")
        if self._complaints:
            self.error(self._complaints.pop())
        return found

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, without the page of usage that would push it off the screen."""
        error = self._refusal([*self._complaints, message])
        if self._file:
            raise error
        self.exit(2, f"error: {printable(error)}\n")

    def _refusal(self, complaints: list[str]) -> ValueError:
        start, what, note = "", "flags", ""
        if self._file:
            start, what, note = f"{self._file}: ", "settings", " (flags stand in a file without --)"
            complaints = [complaint.removeprefix("--") for complaint in complaints]
        end = f"{self.prog} --help lists all {what}"
        if len(complaints) == 1:
            return ValueError(f"{start}{complaints[0]}; {end}")
        return Complaints(f"{start}{len(complaints)} {what} must change{note}; {end}", complaints)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Read the value of a flag; what is no value of it is a complaint like others."""
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            self._complaints.append(f"{action.option_strings[-1]}: {error.message}")

    def _is_switch(self, name: str) -> bool:
        action = self._option_string_actions[name]
        kinds = (argparse.BooleanOptionalAction, argparse._StoreTrueAction)
        return isinstance(action, kinds)
