"""The rotations of positions that a model's heads turn by, and what must hold of them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.checks import check_is, check_is_contiguous


class RopeTables(NamedTuple):
    """The rotations of positions, a row of each, which dimensions turn together, and the factor of
    each position's query."""

    cos: Tensor  # (num_positions, r / 2) float32
    sin: Tensor
    is_interleaved: bool = False
    query_factor: Tensor | None = None  # (num_positions,) float32; None: queries turn like keys

    def at(self, positions: Tensor) -> "RopeTables":  # (B, T) to (B, 1, T, r / 2)
        """Look up the rotations of tokens, for all heads of each."""
        cos, sin = (table[positions].unsqueeze(1) for table in (self.cos, self.sin))
        factor = self.query_factor
        factor = None if factor is None else factor[positions][:, None, :, None]
        return RopeTables(cos, sin, self.is_interleaved, factor)

    def of_queries(self) -> "RopeTables":
        """Multiply the rotations of tokens by the factors of their queries."""
        if self.query_factor is None:
            return self
        return self._replace(cos=self.cos * self.query_factor, sin=self.sin * self.query_factor)

    def followed_by(self, other: "RopeTables") -> "RopeTables":
        """Append the rows of other tables of the same model."""
        cos, sin = torch.cat((self.cos, other.cos)), torch.cat((self.sin, other.sin))
        factor, behind = self.query_factor, other.query_factor
        if factor is not None and behind is not None:
            factor = torch.cat((factor, behind))
        return RopeTables(cos, sin, self.is_interleaved, factor)

    def tensors(self) -> dict[str, Tensor]:
        """List the tensors by their names."""
        factor = {} if self.query_factor is None else {"query_factor": self.query_factor}
        return {"cos": self.cos, "sin": self.sin} | factor

    def launched(self) -> dict[str, Any]:
        """List the arguments of a kernel that rotates by these tables."""
        return {
            "cos_ptr": self.cos,
            "sin_ptr": self.sin,
            # any address where it is not read
            "factor_ptr": self.cos if self.query_factor is None else self.query_factor,
            "INTERLEAVED": self.is_interleaved,
            "SCALES": self.query_factor is not None,
        }


def check_tables(
    positions: Tensor, tables: RopeTables, tokens: tuple[int, int], head_dim: int
) -> None:
    """Refuse tables that are not alike, and positions that are not one for each token.

    Raises:
        ValueError: a shape or a dtype does not fit, or a table is not contiguous.
    """
    cos, sin, _, factor = tables
    halves = (cos, sin)
    if (
        cos.dim() != 2
        or cos.shape != sin.shape
        or any(table.dtype != torch.float32 or not table.is_contiguous() for table in halves)
    ):
        raise ValueError(
            "cos and sin must be contiguous float32 matrices of one shape: got "
            + " and ".join(f"{t.dtype} {tuple(t.shape)} with strides {t.stride()}" for t in halves)
        )
    if head_dim % 2 or not 0 < 2 * cos.shape[1] <= head_dim:
        raise ValueError(
            "heads must have an even number of dimensions, two or more for each column of cos and "
            f"sin: got {head_dim} dimensions and {cos.shape[1]} columns"
        )
    if factor is not None:
        check_is("query_factor", factor, torch.float32, (cos.shape[0],))
        check_is_contiguous("query_factor", factor)
        if 2 * cos.shape[1] != head_dim:
            raise ValueError(
                "all dimensions of a head must turn where queries have a factor: "
                f"got {2 * cos.shape[1]} of {head_dim}"
            )
    if tuple(positions.shape) != tokens or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"positions must be int32 or int64 of shape {tokens}: "
            f"got {positions.dtype} {tuple(positions.shape)}"
        )
