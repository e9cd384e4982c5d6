"""How a checkpoint lays the matrices of all experts out in one tensor, and the ways to and fro.

by rows            (E, rows, columns)         as a matrix multiplies: y = x W^T
by columns         (E, columns, rows)         gpt-oss: y = x W
rows in turn       gate 0, up 0, gate 1 ...   where one matrix has the rows of several
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StackedLayout:
    """How one matrix of a stack lies in a checkpoint.

    Attributes:
        is_transposed: by columns.
        num_in_turn: the matrices whose rows come in turn; 1: of one alone.
    """

    is_transposed: bool = False
    num_in_turn: int = 1

    @property
    def is_by_rows(self) -> bool:
        """Whether a matrix lies as a group has it."""
        return self == StackedLayout()

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        return (columns, rows) if self.is_transposed else (rows, columns)

    def in_rows(self, stored: Tensor) -> Tensor:
        """Bring a stored matrix, or a bias, into rows: those of one matrix, then those of the next.

        gate 0, up 0, gate 1, up 1, ...  ->  gate 0, gate 1, ..., up 0, up 1, ...
        """
        matrix = stored.mT if self.is_transposed and stored.dim() == 2 else stored
        turns = matrix.unflatten(0, (-1, self.num_in_turn))
        return turns.transpose(0, 1).flatten(0, 1).contiguous()

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Bring rows into the order and the orientation of the checkpoint."""
        turns = matrix.unflatten(0, (self.num_in_turn, -1))
        rows = turns.transpose(0, 1).flatten(0, 1)
        return rows.mT.contiguous() if self.is_transposed and rows.dim() == 2 else rows


BY_ROWS = StackedLayout()
