"""lora/linear_group.py: every arrangement of targets, forward and back, against float64."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from equality import assert_equal, assert_no_worse_than
from torch import Tensor

from lora.config import LoRAConfig
from lora.linear_group import LinearGroup
from nf4.weight import NF4Weight, dequantize, quantize

CPU = torch.device("cpu")
NAMES = ("q_proj", "k_proj", "v_proj")
# one round, one prime, one single row
ROWS = (32, 13, 1)
NUM_TOKENS, IN_FEATURES, RANK = 11, 48, 3
# alpha / r is no power of two, so a scaling applied twice or rounded twice shows
ALPHA = 10.0

TARGETS = {
    "none": (),
    "first": ("q_proj",),
    "middle": ("k_proj",),
    "outer": ("q_proj", "v_proj"),
    "all": NAMES,
}
QUANTIZATIONS = {"unquantized": None, "nf4": (64, False), "nf4-dq": (64, True)}


class Case(NamedTuple):
    """A group, and what it was made of in float64."""

    group: LinearGroup
    weight: Tensor  # (N, K)
    bias: Tensor  # (N,)


def make(
    targets: tuple[str, ...] = NAMES,
    quantization: tuple[int, bool] | None = None,
    has_bias: bool = True,
    dropout: float = 0.0,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    rows: tuple[int, ...] = ROWS,
    in_features: int = IN_FEATURES,
) -> Case:
    """A group loaded member by member; its truth is quantized matrix by matrix."""
    group = LinearGroup(NAMES[: len(rows)], rows, in_features, has_bias)
    group.allocate(device, dtype, dtype, quantization)
    weights, biases = [], []
    for name, num_rows in zip(group.names, rows, strict=True):
        matrix = (torch.randn(num_rows, in_features) / in_features**0.5).to(device, dtype)
        bias = torch.randn(num_rows).to(device, dtype) * has_bias
        group.load(f"{name}.weight", matrix, name)
        if has_bias:
            group.load(f"{name}.bias", bias, name)
        if quantization is not None:
            matrix = dequantize(quantize(matrix, *quantization), torch.float32)
        weights.append(matrix.double())
        biases.append(bias.double())
    group.attach(LoRAConfig(RANK, ALPHA, dropout, targets), device, torch.Generator())
    if group.lora_B is not None:
        group.lora_B.data.normal_()
    return Case(group, torch.cat(weights), torch.cat(biases))


def run_ours(group: LinearGroup, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    """The group's outputs and gradients."""
    x = x.clone().requires_grad_()
    group.zero_grad()
    y = torch.cat(group(x), dim=-1)
    y.backward(grad_y)
    assert x.grad is not None
    found = {"y": y.detach(), "grad_x": x.grad}
    for name in ("lora_A", "lora_B"):
        parameter = getattr(group, name)
        if parameter is not None:
            found[f"grad_{name}"] = parameter.grad
    return found


def run_torch(
    case: Case, x: Tensor, grad_y: Tensor, mask: Tensor | None = None, dtype=torch.float64
) -> dict[str, Tensor]:
    """The same by autograd, projection by projection, as PEFT writes it.

    Args:
        mask: what dropout multiplies x with, scale included.
    """
    group = case.group
    x = x.to(dtype, copy=True).requires_grad_()
    leaves = {
        name: getattr(group, name).detach().clone().requires_grad_()
        for name in ("lora_A", "lora_B")
        if group.updates
    }
    pieces = []
    weights = case.weight.to(dtype).split(group.rows)
    biases = case.bias.to(dtype).split(group.rows)
    updates = iter(group.updates)
    for name, weight, bias in zip(group.names, weights, biases, strict=True):
        y = F.linear(x, weight, bias if group.has_bias else None)
        if name in group.targets:
            update = next(updates)
            A = leaves["lora_A"][update.A].to(dtype)
            B = leaves["lora_B"][update.B].to(dtype)
            z = x if mask is None else x * mask.to(dtype)
            y = y + F.linear(F.linear(z, A), B) * group.scaling
        pieces.append(y)
    y = torch.cat(pieces, dim=-1)
    y.backward(grad_y.to(dtype))
    assert x.grad is not None
    found = {"y": y.detach(), "grad_x": x.grad}
    return found | {
        f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None
    }


def absolute(case: Case) -> Case:
    """The case with every number replaced by its absolute value."""
    twin = LinearGroup(case.group.names, case.group.rows, case.group.in_features, True)
    twin.updates, twin.targets = case.group.updates, case.group.targets
    twin.scaling = case.group.scaling
    if case.group.lora_A is not None and case.group.lora_B is not None:
        twin.lora_A = torch.nn.Parameter(case.group.lora_A.detach().abs())
        twin.lora_B = torch.nn.Parameter(case.group.lora_B.detach().abs())
    return Case(twin, case.weight.abs(), case.bias.abs())


def assert_equal_to_float64(
    case: Case, x: Tensor, grad_y: Tensor, mask: Tensor | None = None
) -> None:
    actual = run_ours(case.group, x, grad_y)
    truth = run_torch(case, x, grad_y, mask)
    # outputs and gradients are sums of products: with all signs positive they bound what each
    # rounding can move, and no path has more roundings than there are terms and factors
    scale = run_torch(absolute(case), x.abs(), grad_y.abs(), mask)
    num_roundings = x.shape[0] + case.group.in_features + sum(case.group.rows) + RANK + 8
    tolerance = num_roundings * torch.finfo(torch.float32).eps
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        assert actual[name].shape == expected.shape, name
        assert actual[name].dtype == torch.float32, name
        assert actual[name].isfinite().all(), name
        assert ((actual[name].double() - expected).abs() <= tolerance * scale[name]).all(), name


@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("targets", TARGETS)
def test_outputs_and_gradients_equal_float64(
    targets: str, quantization: str, has_bias: bool
) -> None:
    case = make(TARGETS[targets], QUANTIZATIONS[quantization], has_bias)
    num_targets = len(TARGETS[targets])
    assert len(case.group.updates) == num_targets
    assert isinstance(case.group.weight, NF4Weight) == (quantization != "unquantized")
    x, grad_y = torch.randn(NUM_TOKENS, IN_FEATURES), torch.randn(NUM_TOKENS, sum(ROWS))
    assert_equal_to_float64(case, x, grad_y)


@pytest.mark.parametrize(
    ("num_tokens", "in_features", "rows"),
    [(1, 1, (1,)), (1, 64, (7,)), (64, 37, (5, 3)), (3, 130, (64, 64, 64))],
    ids=["M1-K1-N1", "M1-K64-N7", "M64-K37-N8", "M3-K130-N192"],
)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_other_shapes_equal_float64(
    num_tokens: int, in_features: int, rows: tuple[int, ...], quantization: str
) -> None:
    case = make(NAMES, QUANTIZATIONS[quantization], rows=rows, in_features=in_features)
    assert_equal_to_float64(
        case, torch.randn(num_tokens, in_features), torch.randn(num_tokens, sum(rows))
    )


@pytest.mark.parametrize("targets", ["first", "outer", "all"])
def test_dropout_is_on_the_updates_input_alone(targets: str) -> None:
    case = make(TARGETS[targets], (64, True), dropout=0.4)
    case.group.train()
    x, grad_y = torch.randn(NUM_TOKENS, IN_FEATURES), torch.randn(NUM_TOKENS, sum(ROWS))
    # the one mask that all members share
    torch.manual_seed(17)
    mask = F.dropout(torch.ones(NUM_TOKENS, IN_FEATURES), 0.4)
    assert 0 < (mask == 0).sum() < mask.numel()
    torch.manual_seed(17)
    assert_equal_to_float64(case, x, grad_y, mask)


def test_there_is_no_dropout_in_evaluation() -> None:
    case = make(NAMES, dropout=0.4)
    x = torch.randn(NUM_TOKENS, IN_FEATURES)
    case.group.eval()
    evaluated = torch.cat(case.group(x), dim=-1).detach()
    case.group.dropout = 0.0
    case.group.train()
    assert_equal(torch.cat(case.group(x), dim=-1).detach(), evaluated)


def assert_half_precision(case: Case, num_tokens: int, dtype: torch.dtype) -> None:
    device = case.weight.device
    x = torch.randn(num_tokens, case.group.in_features, device=device).to(dtype)
    grad_y = torch.randn(num_tokens, sum(case.group.rows), device=device).to(dtype)
    torch.manual_seed(17)
    mask = F.dropout(torch.ones_like(x), case.group.dropout)
    torch.manual_seed(17)
    actual = run_ours(case.group.train(), x, grad_y)
    baseline = run_torch(case, x, grad_y, mask, dtype)
    truth = run_torch(case, x, grad_y, mask)
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        # the adapter's leaves are float32, so autograd casts their float64 gradient
        assert_no_worse_than(actual[name], baseline[name], expected.double(), what=name)
    assert actual["y"].dtype == actual["grad_x"].dtype == dtype
    assert actual["grad_lora_A"].dtype == actual["grad_lora_B"].dtype == torch.float32


# a half is dropped, so what is kept is doubled, which rounds nothing
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_no_more_than_twice_as_much_as_torch(
    dtype: torch.dtype, quantization: str, dropout: float
) -> None:
    case = make(NAMES, QUANTIZATIONS[quantization], dropout=dropout, dtype=dtype)
    assert_half_precision(case, NUM_TOKENS, dtype)


def test_leading_dimensions_are_kept_and_members_split() -> None:
    case = make()
    x = torch.randn(2, 5, IN_FEATURES)
    outputs = case.group(x)
    assert [tuple(y.shape) for y in outputs] == [(2, 5, rows) for rows in ROWS]
    flat = case.group(x.view(10, IN_FEATURES))
    for y, expected in zip(outputs, flat, strict=True):
        assert_equal(y.detach().reshape(expected.shape), expected.detach())


@pytest.mark.parametrize("targets", ["none", "all"])
def test_an_input_without_gradient_costs_no_product(
    monkeypatch: pytest.MonkeyPatch, targets: str
) -> None:
    case = make(TARGETS[targets])
    x = torch.randn(NUM_TOKENS, IN_FEATURES)
    calls = []
    monkeypatch.setattr(
        LinearGroup, "multiply_base_transposed", lambda _, grad_y: calls.append(grad_y)
    )
    y = torch.cat(case.group(x), dim=-1)
    # the embeddings are frozen: the first layer's input needs no gradient
    assert y.requires_grad == (targets == "all")
    if y.requires_grad:
        y.sum().backward()
    assert not calls


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_expanded_weight_is_not_saved_for_the_backward_pass(quantization: str) -> None:
    case = make(NAMES, QUANTIZATIONS[quantization])
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.group(torch.randn(NUM_TOKENS, IN_FEATURES, requires_grad=True))
    num_ranks = len(NAMES) * RANK
    expected = [(NUM_TOKENS, IN_FEATURES), (NUM_TOKENS, num_ranks)]
    expected += [(num_ranks, IN_FEATURES), (sum(ROWS), RANK)]
    assert saved == expected


def test_adapter_tensors_are_views_by_pefts_names() -> None:
    case = make(TARGETS["outer"])
    tensors = dict(case.group.adapter_tensors())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "q_proj.lora_A.weight": (RANK, IN_FEATURES),
        "q_proj.lora_B.weight": (ROWS[0], RANK),
        "v_proj.lora_A.weight": (RANK, IN_FEATURES),
        "v_proj.lora_B.weight": (ROWS[2], RANK),
    }
    for tensor in tensors.values():
        tensor.fill_(5)
    assert case.group.lora_A is not None
    assert case.group.lora_B is not None
    assert (case.group.lora_A == 5).all()
    assert (case.group.lora_B == 5).all()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_tensor_that_is_not_finite_is_refused_by_its_name(name: str) -> None:
    group = make(quantization=None).group
    shape = (ROWS[1], IN_FEATURES) if name == "weight" else (ROWS[1],)
    for bad in (torch.nan, torch.inf):
        tensor = torch.zeros(shape)
        tensor.view(-1)[-1] = bad
        with pytest.raises(ValueError, match=r"layers\.3\.k_proj must hold finite values only"):
            group.load(f"k_proj.{name}", tensor, "layers.3.k_proj")


def test_what_is_kept_as_it_is_has_a_home() -> None:
    for quantization in QUANTIZATIONS.values():
        group = make(quantization=quantization).group
        assert group.bias is not None
        home = group.home("k_proj.bias")
        assert home is not None
        assert_equal(home, group.bias[ROWS[0] : ROWS[0] + ROWS[1]])
        home = group.home("k_proj.weight")
        if quantization is not None:
            assert home is None
            continue
        assert home is not None
        home.fill_(3)
        assert isinstance(group.weight, Tensor)
        assert (group.weight[ROWS[0] : ROWS[0] + ROWS[1]] == 3).all()
        assert (group.weight[: ROWS[0]] != 3).all()


def test_a_bias_keeps_its_dtype_beside_a_quantized_weight() -> None:
    group = LinearGroup(("o_proj",), (8,), 64, has_bias=True)
    group.allocate(CPU, None, torch.float16, (64, True))
    bias: Any = torch.randn(8).half()
    group.load("o_proj.weight", torch.randn(8, 64), "o")
    group.load("o_proj.bias", bias, "o")
    assert isinstance(group.bias, Tensor)
    assert_equal(group.bias, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 300])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("targets", ["first", "outer", "all"])
def test_bf16_on_cuda_errs_no_more_than_twice_as_much_as_torch(
    targets: str, quantization: str, num_tokens: int, dropout: float
) -> None:
    case = make(
        TARGETS[targets],
        QUANTIZATIONS[quantization],
        dropout=dropout,
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        rows=(256, 65, 13),
        in_features=320,
    )
    assert_half_precision(case, num_tokens, torch.bfloat16)
