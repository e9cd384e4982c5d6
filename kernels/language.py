"""Triton, the language of the kernels, or stand-ins for it where it is not installed.

Triton has wheels for Linux alone. Elsewhere models train on a CPU, by the operations' references,
but the files that define kernels are imported there too. So these files take triton's names from
here, and no other file imports triton.
"""

try:
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError:
    from kernels.without_triton import TensorDescriptor, knobs, tl, triton

__all__ = ["TensorDescriptor", "knobs", "tl", "triton"]
