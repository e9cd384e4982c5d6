"""The layers that the kernels are measured on, and what an NF4 matrix weighs."""

from nf4.double_quant import GROUP_SIZE

# (out_features, in_features)
LAYERS = {
    "llama-3-8b.q_proj": (4096, 4096),
    "llama-3-8b.k_proj": (1024, 4096),
    "llama-3-8b.gate_proj": (14336, 4096),
    "llama-3-8b.down_proj": (4096, 14336),
}

# out_features of each member, in_features: projections that share an input are one weight
GROUPS = {
    "llama-3-8b.qkv_proj": ((4096, 1024, 1024), 4096),
    "llama-3-8b.gate_up_proj": ((14336, 14336), 4096),
}

BLOCK_SIZE = 64

# a layer's weights are about this large
WEIGHT_STD = 0.02


def nf4_bytes(n: int, k: int) -> float:
    """Count the bytes of an NF4 matrix with double quantization.

    N K (1/2 + 1/B + 4 / (256 B)) = 0.516 N K  with B = 64: codes, their scales, those's scales
    """
    return n * k * (1 / 2 + 1 / BLOCK_SIZE + 4 / (GROUP_SIZE * BLOCK_SIZE))
