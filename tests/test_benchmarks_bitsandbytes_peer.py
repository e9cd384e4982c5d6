"""benchmarks/bitsandbytes_peer.py: the peer works with this checkout on the path."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# a process of its own all the same: the tests' own must not have imported it
SCRIPT = """
import torch
import kernels.nf4_matmul
from benchmarks.bitsandbytes_peer import bitsandbytes
from benchmarks.nf4_matmul import check_agreement
from nf4.weight import dequantize, quantize

torch.manual_seed(0)
peer = bitsandbytes()
matrix, x = torch.randn(128, 64), torch.randn(3, 64)
packed, state = peer.quantize(matrix)
assert torch.equal(packed.flatten(), quantize(matrix).packed)
expanded = peer.dequantize(packed, state)
# its CPU backend takes another second-level code now and then
check_agreement("bitsandbytes", expanded, dequantize(quantize(matrix), torch.float32))
check_agreement("bitsandbytes", peer.matmul(x, packed, state), x @ expanded.T)
for is_8bit in (False, True):
    for is_paged in (False, True):
        parameter = torch.nn.Parameter(torch.ones(64, 64))
        parameter.grad = torch.ones(64, 64)
        peer.adamw([parameter], 0.5, 0.0, is_8bit, is_paged).step()
        assert torch.allclose(parameter, torch.tensor(0.5), atol=1e-5)
print(peer.version)
"""


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_bitsandbytes_runs_beside_our_kernels() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith("0.50")
