"""Samples in files, each read when it is asked for."""

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, overload

import numpy as np

from data.samples import Sample
from data.tokens.pieces import ROW, TOKEN


class TokenFile:
    """The int32 of a file, read where a slice asks for them.

    An open file stays when its name is removed. One that is cut while it is used ends in an error,
    where the pages of a memory map would end the process with SIGBUS.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __getitem__(self, place: slice) -> np.ndarray:  # (stop - start,) int32
        num_bytes = (place.stop - place.start) * TOKEN.itemsize
        content = os.pread(self._descriptor, num_bytes, place.start * TOKEN.itemsize)
        if len(content) < num_bytes:
            raise OSError(
                f"{self._path} must stay as it is while a run reads it: it has been cut since; "
                "start again, or go on with --resume, and the tokens are made again"
            )
        return np.frombuffer(content, TOKEN)


class EndToEnd:
    """Several arrays, one after the other, where no slice is asked for that lies in two."""

    def __init__(self, arrays: "Sequence[Tokens]", sizes: Sequence[int]) -> None:
        self._arrays, self._ends = arrays, np.cumsum(sizes)
        self._starts = self._ends - sizes

    def __getitem__(self, place: slice) -> np.ndarray:  # (stop - start,) int32
        number = int(np.searchsorted(self._ends, place.start, side="right"))
        start = int(self._starts[number])
        return self._arrays[number][place.start - start : place.stop - start]


Tokens: TypeAlias = np.ndarray | TokenFile | EndToEnd


class StoredSamples(Sequence[Sample]):
    """Samples, each made from the arrays when it is asked for.

    Attributes:
        rows: (num_samples,) ROW.
    """

    def __init__(
        self,
        input_ids: Tokens,  # (num_tokens,) int32, of all samples
        labels: Tokens,  # (num_tokens,) int32
        rows: np.ndarray,  # (num_samples,) ROW
        starts: np.ndarray | None = None,  # (num_samples,) int64, by default end to end
    ) -> None:
        self._input_ids, self._labels, self.rows = input_ids, labels, rows
        lengths = rows["length"].astype(np.int64)
        self._starts = np.cumsum(lengths) - lengths if starts is None else starts

    @classmethod
    def joined(cls, parts: "Sequence[StoredSamples]") -> "StoredSamples":
        """The samples of several, each end to end, one after the other."""
        sizes = [int(part.lengths.sum(dtype=np.int64)) for part in parts]
        return cls(
            EndToEnd([part._input_ids for part in parts], sizes),
            EndToEnd([part._labels for part in parts], sizes),
            np.concatenate([part.rows for part in parts]),
        )

    @property
    def lengths(self) -> np.ndarray:  # (num_samples,) int32
        return self.rows["length"]

    def select(self, is_chosen: np.ndarray) -> "StoredSamples":  # (num_samples,) bool
        """The samples that are chosen, in their order."""
        return StoredSamples(
            self._input_ids, self._labels, self.rows[is_chosen], self._starts[is_chosen]
        )

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = int(self._starts[index])
        end = start + int(self.rows["length"][index])
        return Sample(self._input_ids[start:end].tolist(), self._labels[start:end].tolist())


def full_rows(num_rows: int, num_tokens: int) -> StoredSamples:
    """Make samples of one length without their tokens, for a plan without data."""
    rows = np.zeros(num_rows, ROW)
    rows["length"] = num_tokens
    nothing = np.empty(0, TOKEN)
    return StoredSamples(nothing, nothing, rows)
