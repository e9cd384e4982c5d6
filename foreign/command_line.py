"""A command line for people who know other programs' flags (foreign/other_names.py).

An error is a line for each flag, and names the flag that may have been meant:

    --leraning-rate 1e-4        there is no flag --leraning-rate: did you mean --learning-rate?

A file of settings is read by the same code, as a command line of all its settings.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
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
        translation = Translation(flags, self._also, self._elsewhere)
        try:
            words = translation.translate(given)
        except ValueError as error:
            self.error(str(error))
        if translation.answers:
            self.error(*translation.answers)
        found, unknown = self.parse_known_args(words, namespace)
        if unknown and unknown[0].startswith("-"):
            self.error(translation.describe_unknown(unknown[0].partition("=")[0]))
        if unknown:
            self.error(f"arguments must begin with a flag's name: got {unknown[0]!r}")
        return found

    def error(self, message: str, *more: str) -> NoReturn:
        """Say what is wrong, without the page of usage that would push it off the screen."""
        if self._file:
            text = "; ".join([message, *more])
            raise ValueError(f"{self._file}: {text}; {self.prog} --help lists all settings")
        lines = "\nerror: ".join(map(one_line, [message, *more]))
        self.exit(2, f"error: {lines}; {self.prog} --help lists all flags\n")

    def _is_switch(self, name: str) -> bool:
        action = self._option_string_actions[name]
        kinds = (argparse.BooleanOptionalAction, argparse._StoreTrueAction)
        return isinstance(action, kinds)
