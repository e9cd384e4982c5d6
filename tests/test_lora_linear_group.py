"""lora/linear_group.py: every arrangement of targets, forward and back, against float64."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.equality import assert_equal, assert_no_worse_than
from support.micro_steps import NF4
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.dropout import dropout
from lora import linear_group
from lora.config import UpdateSize
from lora.expansion import SixteenBits
from lora.linear_group import TAIL_MULTIPLE, LinearGroup
from lora.rows import Rows
from nf4.weight import NF4Weight, Quantization, dequantize, quantize
from optim.adamw import AdamW
from optim.arena import GradientArena

CPU = torch.device("cpu")
NAMES = ("q_proj", "k_proj", "v_proj")
# one round, one prime, one single row
ROWS = (32, 13, 1)
NUM_TOKENS, IN_FEATURES, RANK = 11, 48, 3
# alpha / r is no power of two, so a scaling applied twice or rounded twice shows
SCALING = 10 / 3

SEED, SITE = 17, 5

TARGETS = {
    "none": (),
    "first": ("q_proj",),
    "middle": ("k_proj",),
    "outer": ("q_proj", "v_proj"),
    "all": NAMES,
}
# one member without an update between two of other ranks and factors
MIXED = {"v_proj": UpdateSize(5, 0.25), "q_proj": UpdateSize(2, 10 / 3)}
QUANTIZATIONS = {
    "unquantized": None,
    "nf4": Quantization(64, False),
    "nf4-dq": NF4,
}


class Case(NamedTuple):
    """A group, and what it was made of in float64."""

    group: LinearGroup
    weight: Tensor  # (N, K)
    bias: Tensor  # (N,)


def sizes_of(targets: Sequence[str], rank: int = RANK) -> dict[str, UpdateSize]:
    return dict.fromkeys(targets, UpdateSize(rank, SCALING))


def load(group: LinearGroup, name: str, tensor: torch.Tensor) -> None:
    home = group.home(name)
    if home is None:
        group.place(name, (tensor,), name)
    else:
        home.copy_(tensor)


def make(
    targets: tuple[str, ...] | dict[str, UpdateSize] = NAMES,
    quantization: Quantization | None = None,
    has_bias: bool = True,
    dropout: float = 0.0,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    rows: tuple[int, ...] = ROWS,
    in_features: int = IN_FEATURES,
    site: int = SITE,
) -> Case:
    """A group loaded member by member; its truth is quantized matrix by matrix."""
    group = LinearGroup(NAMES[: len(rows)], rows, in_features, has_bias)
    group.allocate(device, dtype, dtype, quantization)
    weights, biases = [], []
    for name, num_rows in zip(group.names, rows, strict=True):
        matrix = (torch.randn(num_rows, in_features) / in_features**0.5).to(device, dtype)
        bias = torch.randn(num_rows).to(device, dtype) * has_bias
        load(group, f"{name}.weight", matrix)
        if has_bias:
            load(group, f"{name}.bias", bias)
        if quantization is not None:
            matrix = dequantize(quantize(matrix, *quantization), torch.float32)
        weights.append(matrix.double())
        biases.append(bias.double())
    sizes = targets if isinstance(targets, dict) else sizes_of(targets)
    group.attach(sizes, dropout, device, torch.Generator(), site)
    for name, tensor in group.adapter_tensors():
        if "lora_B" in name:
            tensor.normal_()
    return Case(group, torch.cat(weights), torch.cat(biases))


class Passed(NamedTuple):
    """What a group writes on its way forward and back."""

    y: Tensor  # (M, N)
    h: Tensor  # (M, T)
    grad_x: Tensor | None  # (M, K)
    grad_h: Tensor  # (M, T)
    grads: dict[str, Tensor]  # of the parameters


@torch.no_grad()
def run(
    group: LinearGroup,
    x: Tensor,
    grad_y: Tensor,
    seed: Tensor | None = None,
    start: float = 0.0,  # of the parameters' gradients
    needs_grad_x: bool = True,
    out: Tensor | None = None,
) -> Passed:
    """Run a group forward and back, as a layer does."""
    M, K, N = x.shape[0], group.in_features, group.num_rows
    for parameter in group.parameters():
        parameter.grad = torch.full_like(parameter, start)
    x_ext = group.extended(x)
    y = group(Rows(x_ext), seed, out)
    assert out is None or y is out
    assert_equal(x_ext[:, :K], x)
    h = x_ext[:, K:].clone()
    grad_ext = group.empty_output(M, grad_y)
    grad_ext[:, :N] = grad_y
    grad_x = group.backward(grad_ext, h, seed, needs_grad_x)
    assert_equal(grad_ext[:, :N], grad_y)
    group.accumulate_grad_A(grad_ext, x, seed)
    grads = {f"grad_{name}": p.grad for name, p in group.named_parameters() if p.grad is not None}
    return Passed(y, h, grad_x, grad_ext[:, N:], grads)


def results_of(passed: Passed) -> dict[str, Tensor]:
    """Outputs and gradients, as `run_torch` names them."""
    assert passed.grad_x is not None
    return {"y": passed.y, "grad_x": passed.grad_x} | passed.grads


def seed_on(device: torch.device) -> Tensor:
    return torch.tensor([SEED], device=device)


def mask_of(group: LinearGroup, x: Tensor, seed: Tensor | None) -> Tensor | None:
    """What dropout multiplies x with, scale included."""
    if seed is None or group.dropout == 0:
        return None
    return dropout(torch.ones_like(x), seed, group.site, group.dropout)


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
        if name in group.sizes:
            update = next(updates)
            A = leaves["lora_A"][update.A].to(dtype)
            B = leaves["lora_B"][update.B].to(dtype)
            z = x if mask is None else x * mask.to(dtype)
            y = y + F.linear(F.linear(z, A), B) * update.scaling
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
    twin.updates, twin.sizes = case.group.updates, case.group.sizes
    if case.group.lora_A is not None and case.group.lora_B is not None:
        twin.lora_A = torch.nn.Parameter(case.group.lora_A.detach().abs())
        twin.lora_B = torch.nn.Parameter(case.group.lora_B.detach().abs())
    return Case(twin, case.weight.abs(), case.bias.abs())


def rounded_apart(case: Case, num_tokens: int) -> float:
    """How far float32 sums may be from float64's, in units of their terms' magnitudes.

    No path has more roundings than there are terms and factors.
    """
    rank = 0 if case.group.lora_B is None else case.group.lora_B.shape[1]
    num_roundings = num_tokens + case.group.in_features + case.group.num_rows + rank + 8
    return num_roundings * torch.finfo(torch.float32).eps


def assert_equal_to_float64(
    case: Case,
    x: Tensor,
    grad_y: Tensor,
    seed: Tensor | None = None,
    start: float = 0.0,
    out: Tensor | None = None,
) -> None:
    actual = results_of(run(case.group, x, grad_y, seed, start, out=out))
    mask = mask_of(case.group, x, seed)
    truth = run_torch(case, x, grad_y, mask)
    # outputs and gradients are sums of products: with all signs positive they bound what each
    # rounding can move
    scale = run_torch(absolute(case), x.abs(), grad_y.abs(), mask)
    for name in truth.keys() - {"y", "grad_x"}:
        truth[name] += start
        scale[name] += abs(start)
    tolerance = rounded_apart(case, x.shape[0])
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        assert actual[name].shape == expected.shape, name
        assert actual[name].dtype == torch.float32, name
        assert actual[name].isfinite().all(), name
        assert ((actual[name].double() - expected).abs() <= tolerance * scale[name]).all(), name


def draw(num_tokens: int = NUM_TOKENS) -> tuple[Tensor, Tensor]:
    """Rows and gradients for the usual group."""
    return torch.randn(num_tokens, IN_FEATURES), torch.randn(num_tokens, sum(ROWS))


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
    assert_equal_to_float64(case, *draw())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_members_of_other_ranks_and_factors_equal_float64(
    quantization: str, dropout: float
) -> None:
    case = make(MIXED, QUANTIZATIONS[quantization], dropout=dropout)
    x, grad_y = draw()
    assert_equal_to_float64(case, x, grad_y, seed_on(CPU))
    # the order is the members'
    shapes = {name: tuple(tensor.shape) for name, tensor in case.group.adapter_tensors()}
    assert shapes == {
        "q_proj.lora_A.weight": (2, IN_FEATURES),
        "q_proj.lora_B.weight": (ROWS[0], 2),
        "v_proj.lora_A.weight": (5, IN_FEATURES),
        "v_proj.lora_B.weight": (ROWS[2], 5),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("is_8bit", [False, True], ids=["32bit", "8bit"])
def test_the_room_beyond_a_members_rank_is_never_trained(is_8bit: bool, dtype: torch.dtype) -> None:
    group = make(MIXED, NF4, dropout=0.4, dtype=dtype).group
    assert group.lora_A is not None
    assert group.lora_B is not None
    room_A, room_B = group.lora_A[2:5], group.lora_B[: ROWS[0], 2:]
    before = [tensor.clone() for _, tensor in group.adapter_tensors()]
    optimizer = AdamW(GradientArena(dict(group.named_parameters()), is_8bit), weight_decay=0.1)
    for seed in range(5):
        x, grad_y = (tensor.to(dtype) for tensor in draw())
        optimizer.gradients.zero_()
        x_ext = group.extended(x)
        with torch.no_grad():
            group(Rows(x_ext), seed_on(CPU) + seed)
            h = x_ext[:, IN_FEATURES:].clone()
            grad_ext = group.empty_output(len(x), grad_y)
            grad_ext[:, : sum(ROWS)] = grad_y
            group.backward(grad_ext, h, seed_on(CPU) + seed)
            group.accumulate_grad_A(grad_ext, x, seed_on(CPU) + seed)
        optimizer.step(0.1, 1.0)
        assert not room_A.any()
        assert not room_B.any()
    for tensor, (name, now) in zip(before, group.adapter_tensors(), strict=True):
        assert not torch.equal(tensor, now), name


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


@pytest.mark.parametrize("has_out", [False, True], ids=["new", "part of wider rows"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("targets", TARGETS)
def test_a_product_by_the_packed_weight_equals_float64(
    monkeypatch: pytest.MonkeyPatch, targets: str, has_bias: bool, has_out: bool
) -> None:
    # what a GPU does with few rows
    monkeypatch.setattr(LinearGroup, "_decodes_inside", lambda *_: True)
    case = make(TARGETS[targets], NF4, has_bias)
    x, grad_y = draw(3)
    out = case.group.empty_output(3, x)[:, : sum(ROWS)] if has_out else None
    assert_equal_to_float64(case, x, grad_y, out=out)


@pytest.mark.parametrize("targets", ["first", "outer", "all"])
def test_gradients_are_added_to_what_there_is(targets: str) -> None:
    assert_equal_to_float64(make(TARGETS[targets], NF4), *draw(), start=3.0)


@pytest.mark.parametrize("targets", ["first", "outer", "all"])
def test_dropout_is_on_the_updates_input_alone(targets: str) -> None:
    case = make(TARGETS[targets], NF4, dropout=0.4)
    x, grad_y = draw()
    seed = seed_on(CPU)
    # the one mask that all members share
    mask = mask_of(case.group, x, seed)
    assert mask is not None
    assert 0 < (mask == 0).sum() < mask.numel()
    assert_equal_to_float64(case, x, grad_y, seed)


def test_seed_and_site_decide_the_mask() -> None:
    x, grad_y = draw()
    group = make(NAMES, dropout=0.4).group
    first = run(group, x, grad_y, torch.tensor([1]))
    assert_equal(run(group, x, grad_y, torch.tensor([1])).y, first.y)
    assert not torch.equal(run(group, x, grad_y, torch.tensor([2])).y, first.y)
    group.site += 1
    assert not torch.equal(run(group, x, grad_y, torch.tensor([1])).y, first.y)


def test_a_group_drops_by_the_site_that_it_is_attached_at() -> None:
    ones, seed = torch.ones(NUM_TOKENS, IN_FEATURES), seed_on(CPU)
    for site in (SITE, SITE + 1):
        group = make(NAMES, dropout=0.4, site=site).group
        assert_equal(group.dropped(ones, seed), dropout(ones, seed, site, 0.4))


def test_there_is_no_dropout_without_a_seed() -> None:
    group = make(NAMES, dropout=0.4).group
    x, grad_y = draw()
    dropping, without = run(group, x, grad_y, seed_on(CPU)), run(group, x, grad_y)
    assert not torch.equal(dropping.y, without.y)
    group.dropout = 0.0
    for seed in (None, seed_on(CPU)):
        passed = run(group, x, grad_y, seed)
        for name, expected in results_of(without).items():
            assert_equal(results_of(passed)[name], expected, name)


def assert_half_precision(
    case: Case, num_tokens: int, dtype: torch.dtype, has_out: bool = False
) -> None:
    group, device = case.group, case.weight.device
    x = torch.randn(num_tokens, group.in_features, device=device).to(dtype)
    grad_y = torch.randn(num_tokens, group.num_rows, device=device).to(dtype)
    seed = seed_on(device)
    mask = mask_of(group, x, seed)
    # as gates and ups lie, before their tail
    out = group.empty_output(num_tokens, x)[:, : group.num_rows] if has_out else None
    actual = results_of(run(group, x, grad_y, seed, out=out))
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


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("targets", ["first", "outer", "all"])
def test_tails_hold_h_and_its_gradient(targets: str, dropout: float) -> None:
    case = make(TARGETS[targets], dropout=dropout)
    group = case.group
    x, grad_y = draw()
    seed = seed_on(CPU)
    passed = run(group, x, grad_y, seed)
    assert group.lora_A is not None
    assert group.lora_B is not None
    A, B = group.lora_A.detach().double(), group.lora_B.detach().double()
    mask = mask_of(group, x, seed)
    z = x.double() if mask is None else x.double() * mask
    num_ranks = RANK * len(TARGETS[targets])
    sides = [grad_y.double()[:, update.y] for update in group.updates]
    matrices = [update.scaling * B[update.B] for update in group.updates]
    grad_h = torch.cat([g @ m for g, m in zip(sides, matrices, strict=True)], dim=1)
    scale = torch.cat([g.abs() @ m.abs() for g, m in zip(sides, matrices, strict=True)], dim=1)
    for actual, expected, magnitudes in (
        (passed.h, z @ A.T, z.abs() @ A.abs().T),
        (passed.grad_h, grad_h, scale),
    ):
        assert actual.shape == (NUM_TOKENS, TAIL_MULTIPLE)
        error = (actual[:, :num_ranks].double() - expected).abs()
        assert (error <= rounded_apart(case, NUM_TOKENS) * magnitudes).all()
        # behind the ranks
        assert not actual[:, num_ranks:].any()


@torch.no_grad()
def test_an_expanded_weight_has_its_updates_behind_it() -> None:
    case = make(TARGETS["outer"], NF4)
    group, K, N = case.group, IN_FEATURES, sum(ROWS)
    expansion = group.expand(torch.float32)
    assert isinstance(expansion, SixteenBits)
    W_ext = expansion.W_ext
    assert W_ext.shape == (N + TAIL_MULTIPLE, K + TAIL_MULTIPLE)
    assert_equal(W_ext[:N, :K], case.weight.float())
    assert group.lora_A is not None
    assert_equal(W_ext[N : N + 2 * RANK, :K], group.lora_A.detach())
    # nothing was written to the corner, so a result that is finite has not read it
    assert W_ext[N:, K:].isnan().all()
    # k_proj has no update
    assert not W_ext[ROWS[0] : ROWS[0] + ROWS[1], K:].any()


def test_few_rows_beside_a_weight_that_stays_expanded_have_the_updates_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as on a GPU, where so few rows are multiplied by the packed weight
    monkeypatch.setattr(LinearGroup, "_decodes_inside", lambda *_: True)
    group = make(TARGETS["outer"], NF4).group
    given = (torch.randn(NUM_TOKENS, IN_FEATURES), torch.randn(NUM_TOKENS, sum(ROWS)))
    expected = results_of(run(group, *given))
    group.keep_expanded(torch.float32)
    for name, tensor in results_of(run(group, *given)).items():
        assert_equal(tensor, expected[name], name)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("targets", ["none", "outer", "all"])
def test_a_weight_that_stays_expanded_follows_its_updates(
    targets: str, quantization: str, dropout: float
) -> None:
    group = make(TARGETS[targets], QUANTIZATIONS[quantization], dropout=dropout).group
    group.keep_expanded(torch.float32)
    kept = group.expanded
    for _ in range(2):
        with torch.no_grad():
            for parameter in group.parameters():
                parameter.normal_()
        given = (torch.randn(NUM_TOKENS, IN_FEATURES), torch.randn(NUM_TOKENS, sum(ROWS)))
        group.expanded = kept
        actual = run(group, *given, seed_on(CPU))
        group.expanded = None
        expected = run(group, *given, seed_on(CPU))
        for name, tensor in results_of(actual).items():
            assert_equal(tensor, results_of(expected)[name])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_without_updates_there_is_no_tail(quantization: str) -> None:
    case = make((), QUANTIZATIONS[quantization])
    group = case.group
    x, grad_y = draw()
    assert group.tail == 0
    assert group.extended(x) is x
    assert group.empty_input(3, x).ext.shape == (3, IN_FEATURES)
    assert group.empty_output(3, x).shape == (3, sum(ROWS))
    (W,) = group.expand(torch.float32).tensors()
    assert_equal(W, case.weight.float())
    assert run(group, x, grad_y, needs_grad_x=False).grad_x is None


@pytest.mark.parametrize(
    ("rank", "num_targets", "tail"), [(1, 1, 64), (16, 3, 64), (64, 1, 64), (22, 3, 128)]
)
def test_a_tail_is_a_whole_number_of_vectors(rank: int, num_targets: int, tail: int) -> None:
    group = LinearGroup(NAMES, ROWS, IN_FEATURES, has_bias=False)
    group.attach(sizes_of(NAMES[:num_targets], rank), 0.0, CPU, torch.Generator(), SITE)
    assert group.tail == tail
    x = torch.randn(3, IN_FEATURES).half()
    x_ext = group.extended(x)
    assert (x_ext.shape, x_ext.dtype) == ((3, IN_FEATURES + tail), torch.float16)
    assert_equal(x_ext[:, :IN_FEATURES], x)
    # of numbers, which products in 16 bits on a CPU read too
    assert not x_ext[:, IN_FEATURES:].any()
    y_ext = group.empty_output(3, x)
    assert (y_ext.shape, y_ext.dtype) == ((3, sum(ROWS) + tail), torch.float16)


@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("targets", ["none", "outer"])
def test_an_output_may_be_part_of_wider_rows(targets: str, has_bias: bool) -> None:
    group = make(TARGETS[targets], NF4, has_bias).group
    x, grad_y = draw()
    wide = torch.full((NUM_TOKENS, sum(ROWS) + 3), torch.nan)
    passed = run(group, x, grad_y, out=wide[:, : sum(ROWS)])
    assert_equal(passed.y, run(group, x, grad_y).y)
    assert wide[:, sum(ROWS) :].isnan().all()


@contextmanager
def products() -> Iterator[list[tuple[tuple[int, ...], ...]]]:
    """The shapes of the two factors of every matrix product."""
    found = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func.overloadpacket.__name__.rstrip("_") in ("mm", "addmm", "bmm", "matmul"):
                found.append(tuple(tuple(factor.shape) for factor in args[-2:]))
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield found


@pytest.mark.parametrize("targets", ["none", "first", "outer", "all"])
def test_an_input_without_gradient_costs_no_product(targets: str) -> None:
    group = make(TARGETS[targets], NF4, dropout=0.4).group
    x, grad_y = draw()
    expected = run(group, x, grad_y, seed_on(CPU))
    with products() as found:
        # the embeddings are frozen: the first layer's input needs no gradient
        passed = run(group, x, grad_y, seed_on(CPU), needs_grad_x=False)
    assert passed.grad_x is None
    M, N, K, T = NUM_TOKENS, sum(ROWS), IN_FEATURES, group.tail
    num_ranks = RANK * len(group.updates)
    forward = [((M, K), (K, T))] * bool(group.updates) + [((M, K + T), (K + T, N))]
    backward = [((M, N), (N, T))]
    backward += [((update.y.stop - update.y.start, M), (M, RANK)) for update in group.updates]
    backward += [((num_ranks, M), (M, K))]
    assert found == forward + backward * bool(group.updates)
    for name, gradient in expected.grads.items():
        assert_equal(passed.grads[name], gradient, name)


@pytest.mark.parametrize("targets", ["none", "all"])
def test_base_and_updates_share_each_product(targets: str) -> None:
    group = make(TARGETS[targets], NF4).group
    M, N, K, T = NUM_TOKENS, sum(ROWS), IN_FEATURES, group.tail
    with products() as found:
        run(group, *draw())
    assert ((M, K + T), (K + T, N)) in found
    assert ((M, N + T), (N + T, K)) in found
    assert len(found) == 2 + (2 + len(group.updates) + 1) * bool(group.updates)


def test_a_new_A_is_uniform_up_to_pefts_bound_and_a_new_B_zero() -> None:
    group = LinearGroup(NAMES, ROWS, IN_FEATURES, has_bias=False)
    group.attach(sizes_of(NAMES, 64), 0.0, CPU, torch.Generator(), SITE)
    assert group.lora_A is not None
    assert group.lora_B is not None
    share = group.lora_A.detach() * IN_FEATURES**0.5
    # of 9,216 draws between -1 and 1
    assert 0.99 < share.abs().max() <= 1
    assert abs(float(share.mean())) < 0.05
    assert abs(float(share.abs().mean()) - 0.5) < 0.05
    assert not group.lora_B.any()


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
    group.allocate(CPU, None, torch.float16, NF4)
    bias: Any = torch.randn(8).half()
    load(group, "o_proj.weight", torch.randn(8, 64))
    load(group, "o_proj.bias", bias)
    assert isinstance(group.bias, Tensor)
    assert_equal(group.bias, bias)


# the second fits the kernels that multiply a packed weight
GPU_SHAPES = {"odd": ((256, 65, 13), 320), "even": ((256, 64, 128), 512)}


def gpu_case(targets: str, quantization: str, dropout: float, shape: str) -> Case:
    rows, in_features = GPU_SHAPES[shape]
    return make(
        TARGETS[targets],
        QUANTIZATIONS[quantization],
        dropout=dropout,
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        rows=rows,
        in_features=in_features,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("has_out", [False, True], ids=["new", "part of wider rows"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 300])
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("targets", ["first", "outer", "all"])
def test_gpu_bf16_errs_no_more_than_twice_as_much_as_torch(
    targets: str, quantization: str, shape: str, num_tokens: int, dropout: float, has_out: bool
) -> None:
    case = gpu_case(targets, quantization, dropout, shape)
    assert_half_precision(case, num_tokens, torch.bfloat16, has_out)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "num_calls"), [(1, 1), (16, 1), (300, 0)])
def test_gpu_few_rows_are_multiplied_by_the_packed_weight(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, num_calls: int
) -> None:
    # whichever device it is, it multiplies 16 rows packed and expands for 300
    group = gpu_case("outer", "nf4-dq", 0.5, "even").group
    calls = []
    multiply = linear_group.nf4_matmul

    def recorded(x: Tensor, weight: NF4Weight) -> Tensor:
        calls.append(x.shape)
        return multiply(x, weight)

    monkeypatch.setattr(linear_group, "nf4_matmul", recorded)
    x = torch.randn(num_tokens, group.in_features, device="cuda").bfloat16()
    with torch.no_grad():
        x_ext = group.extended(x)
        group(Rows(x_ext))
        assert len(calls) == num_calls
        # not for a product whose h is of a dropped x
        group(Rows(x_ext), seed_on(x.device))
    assert len(calls) == num_calls
