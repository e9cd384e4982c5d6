"""Instructions that the fused products need and Triton's language lacks, as inline PTX.

Loads: `tl.load` fixes which thread holds which element, and moving a decoded weight from there to
where the tensor cores want it costs more than decoding it. An inline instruction is elementwise, so
the compiler computes each pointer in the thread that needs the value, and nothing moves.

Decoding: PRMT picks 4 bytes out of 8 by 4 selectors of 3 bits, so it looks up 4 codes in half a
table at once. The 16 levels, rounded to 16 bits, are split into a plane of low and a plane of high
bytes, 4 registers each; 14 PRMT and 7 other instructions decode the 8 codes of a word.

Triton's interpreter knows no PTX: there, the plain Triton beside each instruction runs, which also
shows a reader what the instruction does. The tests on a GPU compare the two.
"""

# triton's annotations know neither tuples of tensors nor that a number serves as a constexpr
# pyright: reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

import torch
from torch import Tensor

from kernels.constants import constant
from kernels.language import knobs, tl, triton
from nf4.levels import LEVELS

HAS_PTX = tl.constexpr(not knobs.runtime.interpret)
# lanes that share a row of a tensor core's operand
QUAD = tl.constexpr(4)


@constant
def level_planes(dtype: torch.dtype, device: torch.device) -> Tensor:  # (QUAD, 8) int32
    """Split the levels, rounded to bf16 or fp16, into 16 low and 16 high bytes, 4 a word.

    One copy for each lane of a quad: values that are the same in all threads would be kept in
    uniform registers and copied from there before each PRMT.
    """
    bits = LEVELS.to(dtype).view(torch.int16).int() & 0xFFFF
    planes = torch.cat((bits & 0xFF, bits >> 8)).to(torch.uint8).view(torch.int32)
    return planes.repeat(QUAD.value, 1).to(device)


@triton.jit
def _load_int(INSTRUCTION: tl.constexpr, ptr):
    return tl.inline_asm_elementwise(
        INSTRUCTION, "=r,l", [ptr.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def load_byte(ptr):
    if HAS_PTX:
        return _load_int("ld.global.nc.u8 $0, [$1];", ptr)
    else:
        return tl.load(ptr).to(tl.int32)


@triton.jit
def load_word(ptr):
    if HAS_PTX:
        return _load_int("ld.global.nc.b32 $0, [$1];", ptr)
    else:
        return tl.load(ptr)


@triton.jit
def load_float(ptr):
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];",
            "=f,l",
            [ptr.to(tl.int64)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(ptr)


@triton.jit
def stream_two_words(ptr):  # 8-byte aligned; read once, so past the first-level cache
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            "ld.global.nc.L1::no_allocate.L2::128B.v2.b32 {$0, $1}, [$2];",
            "=r,=r,l",
            [ptr.to(tl.int64)],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(ptr), tl.load(ptr + 1)


@triton.jit
def load_four_words(ptr):  # 16-byte aligned
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [ptr.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)


@triton.jit
def nested_absmax(value, group_absmax, mean):
    # a product and a sum, each rounded, as the format has it: no fused multiply-add
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .f32 product;
            mul.rn.f32 product, $1, $2;
            add.rn.f32 $0, product, $3;
            }
            """,
            "=f,f,f,f",
            [value, group_absmax, mean],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return value * group_absmax + mean


@triton.jit
def load_planes(planes_ptr, lane):  # lane: of a quad, in the shape of the words to decode
    planes = ()
    for index in tl.static_range(8):
        planes = planes + (load_word(planes_ptr + lane * 8 + index),)  # noqa: RUF005, triton knows no star
    return planes


@triton.jit
def _plane_byte(code, plane_0, plane_1, plane_2, plane_3):
    lower = tl.where(code < 4, plane_0, plane_1)
    upper = tl.where(code < 12, plane_2, plane_3)
    return (tl.where(code < 8, lower, upper) >> (code % 4 * 8)) & 0xFF


@triton.jit
def _level_bits(code, planes):
    low = _plane_byte(code, planes[0], planes[1], planes[2], planes[3])
    return low | _plane_byte(code, planes[4], planes[5], planes[6], planes[7]) << 8


@triton.jit
def decode_word(word, planes):
    # 4 bytes, whose high nibbles come first, to 4 words of two 16-bit levels each
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 codes, low_nibbles_up, is_upper, low, high, low_upper, high_upper;
            and.b32 codes, $4, 0x77777777;
            shl.b32 low_nibbles_up, $4, 4;
            // a selector with its highest bit set repeats a byte's highest bit: that of the code
            prmt.b32 is_upper, $4, low_nibbles_up, 0x9D8C;
            prmt.b32 low, $5, $6, codes;
            prmt.b32 low_upper, $7, $8, codes;
            prmt.b32 high, $9, $10, codes;
            prmt.b32 high_upper, $11, $12, codes;
            lop3.b32 low, is_upper, low_upper, low, 0xCA;
            lop3.b32 high, is_upper, high_upper, high, 0xCA;
            prmt.b32 $0, low, high, 0x4051;
            prmt.b32 $1, low, high, 0x6273;
            shr.b32 codes, codes, 16;
            prmt.b32 is_upper, $4, low_nibbles_up, 0xBFAE;
            prmt.b32 low, $5, $6, codes;
            prmt.b32 low_upper, $7, $8, codes;
            prmt.b32 high, $9, $10, codes;
            prmt.b32 high_upper, $11, $12, codes;
            lop3.b32 low, is_upper, low_upper, low, 0xCA;
            lop3.b32 high, is_upper, high_upper, high, 0xCA;
            prmt.b32 $2, low, high, 0x4051;
            prmt.b32 $3, low, high, 0x6273;
            }
            """,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [
                word,
                planes[0],
                planes[1],
                planes[2],
                planes[3],
                planes[4],
                planes[5],
                planes[6],
                planes[7],
            ],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        pairs = ()
        for byte in tl.static_range(4):
            first = _level_bits((word >> (8 * byte + 4)) & 15, planes)
            second = _level_bits((word >> (8 * byte)) & 15, planes)
            pairs = pairs + (first | second << 16,)  # noqa: RUF005, triton knows no star
        return pairs


@triton.jit
def _half(pair, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    return (pair >> SHIFT).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def split_pair(pair, DTYPE: tl.constexpr):
    # words of two numbers each to a tensor with one more dimension: which of them
    return tl.join(_half(pair, 0, DTYPE), _half(pair, 16, DTYPE))


@triton.jit
def split_pairs(pair_0, pair_1, pair_2, pair_3, DTYPE: tl.constexpr):
    # 4 words of two numbers each to a tensor with 3 more dimensions: word // 2, word % 2, which
    words = tl.join(tl.join(pair_0, pair_2), tl.join(pair_1, pair_3))
    return split_pair(words, DTYPE)
