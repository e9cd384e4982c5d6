"""A command line for people who know other programs' flags (foreign/other_names.py).

An error is a line, and names the flag that may have been meant:

    --leraning-rate 1e-4        there is no flag --leraning-rate: did you mean --learning-rate?

A file of settings is read by the same code, as a command line of all its settings.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from foreign.other_names import Translation
from foreign.terminal import one_line


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

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Read the arguments; what a command line cannot be ends the process with a line.

        Raises:
            ValueError: arguments of a file are not what they must be.
        """
        given = sys.argv[1:] if args is None else args
        flags = {name: self._is_switch(name) for name in self._option_string_actions}
        try:
            words = Translation(flags, self._also, self._elsewhere).translate(given)
        except ValueError as error:
            self.error(str(error))
        found, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(self._describe(unknown[0]))
        return found

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, without the page of usage that would push it off the screen."""
        if self._file:
            raise ValueError(f"{self._file}: {message}; {self.prog} --help lists all settings")
        self.exit(2, f"error: {one_line(message)}; {self.prog} --help lists all flags\n")

    def _is_switch(self, name: str) -> bool:
        action = self._option_string_actions[name]
        kinds = (argparse.BooleanOptionalAction, argparse._StoreTrueAction)
        return isinstance(action, kinds)

    def _describe(self, unknown: str) -> str:
        """Say that an argument is unknown, and what it may have been meant to be."""
        if not unknown.startswith("-"):
            return f"arguments must begin with a flag's name: got {unknown!r}"
        typed = unknown.partition("=")[0]
        known = [*self._option_string_actions, *(name.split()[0] for name in self._also)]
        near = get_close_matches(typed.replace("_", "-"), known, n=1, cutoff=0.7)
        meant = self._also.get(near[0], near[0]) if near else ""
        return f"there is no flag {typed}" + (f": did you mean {meant}?" if near else "")
