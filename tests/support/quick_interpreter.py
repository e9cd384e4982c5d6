"""Lets Triton's interpreter do once what it does again at every operation.

An operation on a tiny tile takes numpy a microsecond, and the interpreter a hundred: it makes the
types of shapes that it has made before, tables of types, and sums for a check that it leaves out.
What a kernel computes stays the same bits.
"""

from functools import cache
from typing import Any

import numpy as np
from triton import language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def let_functions_find_the_language_patched() -> None:
    """Patch Triton's language at each launch, and not at each call of a kernel's functions too.

    The launch has patched all that functions of kernels/ see.
    """
    original = interpreter.InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__.startswith("kernels."):
            return self.rewrite()(*args, **kwargs)
        return original(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def let_shapes_be_checked_once() -> None:
    """Keep what a tile's type and a tile say of a shape, so that equal shapes are one object."""
    original_type, original_tile = tl.block_type.__init__, tl.tensor.__init__
    original_broadcast = TritonSemantic.broadcast_impl_value
    shapes: dict[tuple[int, ...], Any] = {}
    types: dict[Any, dict[str, Any]] = {}
    # by what stays in `shapes`, or is a scalar's
    tiles: dict[int, dict[str, Any]] = {}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(shape)
        # constants that are equal to their values are not kept
        if not all(type(size) is int for size in sizes):
            original_type(self, element_ty, shape)
            return
        # names leave out where a pointer points; the type is kept, so its id stays its own
        known = types.get((sizes, id(element_ty)))
        if known is None:
            original_type(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            known = types[sizes, id(element_ty)] = dict(vars(self))
        vars(self).update(known)

    def init_tile(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else ()
        known = tiles.get(id(shape))
        if known is None:
            original_tile(self, handle, type)
            if shape == () or any(shape is one for one in shapes.values()):
                tiles[id(shape)] = {"shape": self.shape, "numel": self.numel}
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        vars(self).update(known)

    def broadcast(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return original_broadcast(self, lhs, rhs)

    tl.block_type.__init__ = init_type
    tl.tensor.__init__ = init_tile
    TritonSemantic.broadcast_impl_value = broadcast


def let_numpys_types_be_looked_up() -> None:
    """Keep numpy's type of each of Triton's."""
    original = interpreter._get_np_dtype
    known = cache(lambda name: original(tl.dtype(name)))

    def get_np_dtype(tt_dtype: Any) -> Any:
        scalar = tt_dtype.scalar
        return np.dtype(np.uint64) if scalar.is_ptr() else known(scalar.name)

    interpreter._get_np_dtype = get_np_dtype


def let_overflow_be_left_alone() -> None:
    """Leave out the sums in 64 bits for a check that the interpreter makes of no kernel."""
    assert not interpreter.interpreter_builder.options.debug

    def leave_alone(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        pass

    TritonSemantic.binary_op_sanitize_overflow_impl = leave_alone


def quicken() -> None:
    """Do all of it."""
    let_functions_find_the_language_patched()
    let_shapes_be_checked_once()
    let_numpys_types_be_looked_up()
    let_overflow_be_left_alone()
