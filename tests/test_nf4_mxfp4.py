"""nf4/mxfp4.py: values by the specification, and what NF4 makes of them."""

import pytest
import torch
from support.equality import assert_equal
from support.mxfp4_cases import all_codes_at_all_scales
from torch import Tensor

from nf4.mxfp4 import VALUES, expand
from nf4.weight import dequantize, quantize


def by_the_specification(code: int, scale: int) -> float:
    """A sign, two bits of an exponent with a bias of 1, and one of a mantissa, which alone makes
    subnormal numbers."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return (-1) ** sign * value * 2.0 ** (scale - 127)


@pytest.mark.parametrize("scale", [0, 1, 100, 127, 128, 252])
def test_every_code_is_expanded_exactly(scale: int) -> None:
    blocks, scales = all_codes_at_all_scales()
    found = expand(blocks[scale], scales[scale])
    assert found.dtype == torch.bfloat16
    assert found.shape == (1, 512)
    # the low half of a byte comes first
    codes = [code for byte in range(256) for code in (byte & 15, byte >> 4)]
    expected = torch.tensor([by_the_specification(c, scale) for c in codes], dtype=torch.float64)
    assert_equal(found[0].double(), expected)


@pytest.mark.gpu
def test_a_gpu_expands_to_the_same_bits() -> None:
    blocks, scales = all_codes_at_all_scales()
    found = expand(blocks.cuda(), scales.cuda()).cpu()
    assert torch.equal(found.view(torch.int16), expand(blocks, scales).view(torch.int16))


def test_a_block_has_one_scale_and_32_values() -> None:
    blocks = torch.full((2, 3, 16), 0x22, dtype=torch.uint8)
    scales = torch.tensor([[127, 128, 129], [126, 125, 124]], dtype=torch.uint8)
    expected = torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.25, 0.125]]).repeat_interleave(32, 1)
    assert_equal(expand(blocks, scales), expected.bfloat16())


def test_a_scale_that_is_nan_or_too_large_is_not_finite() -> None:
    blocks = torch.full((1, 1, 16), 0x77, dtype=torch.uint8)
    for scale in (254, 255):
        scales = torch.full((1, 1), scale, dtype=torch.uint8)
        assert not expand(blocks, scales).isfinite().any()


def in_mxfp4(weights: Tensor) -> Tensor:
    """Round to MXFP4 as its specification does, and expand."""
    parts = weights.view(-1, 32)
    exponents = parts.abs().amax(1, keepdim=True).log2().floor() - 2
    magnitudes = torch.tensor(VALUES[:8])
    scaled = (parts.abs() / exponents.exp2()).clamp(max=6)
    codes = (scaled[..., None] - magnitudes).abs().argmin(-1) + 8 * (parts < 0)
    pairs = codes.to(torch.uint8).view(len(weights), -1, 16, 2)
    scales = (exponents + 127).to(torch.uint8).view(len(weights), -1)
    return expand(pairs[..., 0] | pairs[..., 1] << 4, scales).float()


def test_nf4_rounds_mxfp4_by_what_the_documents_say() -> None:
    weights = torch.randn(256, 2880, generator=torch.Generator().manual_seed(0))
    stored = in_mxfp4(weights)
    rounded = dequantize(quantize(stored, 64, True), torch.float32)

    def error(found: Tensor, truth: Tensor) -> float:
        return float((found - truth).norm() / truth.norm())

    # docs/models.md
    assert round(100 * error(stored, weights)) == 11
    assert 0.07 < error(rounded, stored) < 0.08
    assert 0.13 < error(rounded, weights) < 0.14
