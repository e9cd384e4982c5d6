"""benchmarks/train_step.py and its processes: a tiny checkpoint, and what may go wrong."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.micro_steps import NF4
from support.stand_in_gpu import install
from support.tiny_llama import FIELDS, VARIANTS

from benchmarks import load, train_step, train_step_limit, train_step_ours
from benchmarks.random_model import CONFIGS
from benchmarks.step_timing import (
    NUM_BLOCKS,
    NUM_WARM_UPS,
    Stopwatch,
    measure_shapes,
    parse_shape,
    random_ids,
)
from benchmarks.tables import aligned, train_step_lines, train_step_table
from benchmarks.train_step import (
    RECIPES,
    Bench,
    Provider,
    Recipe,
    last_error,
    measure_all,
    prepare_checkpoint,
    providers_of,
    read_output,
    run_process,
    some_of,
    without_checkout,
)
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from kernels.fp8 import Fp8Rows, Fp8Weight
from llama.config import LlamaConfig, read_config
from llama.layer_heads import Heads
from run.config import TrainConfig

CPU = torch.device("cpu")
TINY = Recipe(("1x8", "2x6"), rank=2, optim="adamw")
# a peer's kernels want whole blocks
PEER_FIELDS = train_step.FIELDS | FIELDS | {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "BLOCK_ELEMENTS", 1000)


@pytest.fixture
def checkpoint(tmp_path: Path, _small_blocks: None) -> Path:
    return prepare_checkpoint(tmp_path / "model", PEER_FIELDS)


def bench_of(checkpoint: Path | str, recipe: Recipe = TINY, time_limit: float = 120.0) -> Bench:
    return Bench(recipe, str(checkpoint), recipe.shapes, 3, time_limit)


def step_row(provider: str, policy: str, shape: str, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "provider": provider,
        "policy": policy,
        "shape": shape,
        "tokens_per_second": rate,
        "ms_p50": 1.0,
        **more,
    }


def test_a_checkpoint_is_written_once_and_is_one_of_ours(checkpoint: Path) -> None:
    before = (checkpoint / "model.safetensors.index.json").stat().st_mtime_ns
    prepare_checkpoint(checkpoint, PEER_FIELDS)
    assert (checkpoint / "model.safetensors.index.json").stat().st_mtime_ns == before
    load_model(open_checkpoint(checkpoint), CPU, torch.bfloat16, NF4)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        json.loads((checkpoint / name).read_text())


def test_the_written_config_is_an_8b_llamas(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(train_step.FIELDS))
    config = read_config(tmp_path)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (32, 4096, 128256)


def test_our_process_measures_every_shape(checkpoint: Path) -> None:
    outcome = bench_of(checkpoint).measure(Provider("ours", "recompute"))
    assert [row.get("error") for row in outcome.rows] == [None, None]
    assert [row["shape"] for row in outcome.rows] == ["1x8", "2x6"]
    for row in outcome.rows:
        assert (row["provider"], row["policy"], row["peak_gib"]) == ("ours", "recompute", None)
        assert row["tokens_per_second"] > 0
        assert len(row["losses"]) == NUM_WARM_UPS + NUM_BLOCKS * 3
        assert row["load_s"] < row["first_step_s"]


def test_a_peers_process_computes_our_losses(checkpoint: Path) -> None:
    pytest.importorskip("bitsandbytes")
    bench = bench_of(checkpoint, Recipe(("2x6", "1x8"), rank=2, optim="adamw"))
    ours = bench.measure(Provider("ours", "keep"))
    theirs = bench.measure(Provider("hf", "recompute"))
    assert [row.get("error") for row in theirs.rows] == [None, None]
    assert theirs.versions["bitsandbytes"]
    assert [row["shape"] for row in theirs.rows] == [row["shape"] for row in ours.rows]
    # the very first is of the checkpoint alone, before adapters that began otherwise have learned
    # anything; bf16 keeps 8 bits
    first, other = (outcome.rows[0]["losses"][0] for outcome in (ours, theirs))
    assert first == pytest.approx(other, rel=2**-8)


def test_a_peer_that_is_not_installed_has_rows_that_say_so(checkpoint: Path) -> None:
    outcome = bench_of(checkpoint).measure(Provider("unsloth", "offload"))
    assert [row["shape"] for row in outcome.rows] == ["1x8", "2x6"]
    for row in outcome.rows:
        assert "No module named 'unsloth'" in row["error"]


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_process_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    text = "import subprocess, time; print('{\"is_ready\": true}', flush=True);"
    text += "subprocess.Popen(['sleep', '60']); time.sleep(60)"
    outcome = run_process(script(text), tmp_path, {}, 1.0)
    assert outcome.is_timed_out
    assert outcome.is_ready
    assert outcome.error == "not done after 1 s"


def test_a_process_that_fails_leaves_its_last_error(tmp_path: Path) -> None:
    outcome = run_process(script("print('hello'); raise KeyError('x')"), tmp_path, {}, 60.0)
    assert outcome.error == "exit code 1: KeyError: 'x'"
    assert not outcome.rows


def test_a_shape_that_ends_the_process_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(_: object, provider: Provider, shapes: list[str]) -> train_step.Outcome:
        asked.append(list(shapes))
        outcome = train_step.Outcome(is_ready=True)
        for shape in shapes:
            if shape == "2x2":
                outcome.error = "exit code 1: RuntimeError: a launch failed"
                break
            outcome.rows.append(step_row(*provider, shape, 1.0))
        return outcome

    monkeypatch.setattr(Bench, "_run", run)
    found = bench_of("", Recipe(("1x1", "2x2", "3x3"))).measure(Provider("ours", "keep"))
    assert asked == [["1x1", "2x2", "3x3"], ["3x3"]]
    assert [row.get("error") for row in found.rows] == [
        None,
        "exit code 1: RuntimeError: a launch failed",
        None,
    ]


def test_the_file_is_written_after_every_provider(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, sizes = tmp_path / "result.json", []

    def measure(_: object, provider: Provider) -> train_step.Outcome:
        sizes.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        return train_step.Outcome([step_row(*provider, "1x1", 1.0)], {"torch": "2"})

    monkeypatch.setattr(Bench, "measure", measure)
    providers = providers_of(TINY, ["keep"], ["unsloth"])
    assert providers == [("limit", "keep"), ("ours", "keep"), *train_step.PEERS["unsloth"]]
    record = measure_all(bench_of(""), providers, {"device": "a GPU"}, path)
    assert sizes == [0, 1, 2, 3]
    assert json.loads(path.read_text()) == record


def test_without_a_checkpoint_there_are_no_peers() -> None:
    names = {provider.name for provider in providers_of(RECIPES["70b"], ["offload"], ["hf"])}
    assert names == {"limit", "ours"}


def test_one_policy_of_a_peer_can_be_asked_for() -> None:
    assert providers_of(TINY, [], ["unsloth:keep", "hf"])[1:] == [
        ("unsloth", "keep"),
        ("hf", "recompute"),
    ]


def test_output_among_other_lines_is_found() -> None:
    rows = [{"is_ready": True}, {"versions": {"a": "1"}}, {"provider": "hf", "shape": "1x1"}]
    text = "a banner\n" + "\n".join(map(json.dumps, rows)) + '\n{not json\n{"provider": "h'
    outcome = read_output(text)
    assert outcome.is_ready
    assert outcome.versions == {"a": "1"}
    assert outcome.rows == rows[2:]


def test_the_last_error_is_named() -> None:
    assert last_error("Traceback\n  File\nValueError: bad\nsome warning\n") == "ValueError: bad"
    assert last_error("killed\n") == "killed"
    assert last_error("") == "no message"


def test_peers_do_not_see_the_checkout(tmp_path: Path) -> None:
    root = str(train_step.ROOT)
    assert without_checkout(f"{root}:{tmp_path}::{root}/") == str(tmp_path)
    assert without_checkout("site") == str(Path("site").resolve())


def test_flags_name_what_there_is() -> None:
    assert some_of("hf,", ["hf", "unsloth"], "--peers") == ["hf"]
    assert some_of("keep,auto:8GiB", ["keep", "auto"], "--ours") == ["keep", "auto:8GiB"]
    with pytest.raises(ValueError, match="--peers must name some of hf: got 'axolotl'"):
        some_of("axolotl", ["hf"], "--peers")
    assert parse_shape("4x2048") == (4, 2048)
    for text in ("4", "4x", "0x2", "ax2", "1x2x3"):
        with pytest.raises(ValueError, match="SAMPLESxTOKENS"):
            parse_shape(text)


def test_a_shape_without_room_has_an_error_and_the_next_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def make_step(shape: tuple[int, int]) -> Any:
        def step(ids: torch.Tensor) -> torch.Tensor:
            if shape[0] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")
            return ids.float().mean()

        if shape[1] > 4:
            raise ValueError("too long")
        return step, {"layers": "2 keep"}

    measure_shapes({"provider": "ours"}, ["2x4", "1x5", "1x4"], 10, 3, 0.0, make_step)
    first, failed, refused, measured = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"is_ready": True, "provider": "ours"}
    assert failed["error"] == "out of memory: CUDA out of memory. Tried"
    assert refused["error"] == "too long"
    assert measured["layers"] == "2 keep"
    assert measured["ms_min"] <= measured["ms_p50"] <= measured["ms_max"]


def test_all_providers_get_the_same_tokens() -> None:
    ids = random_ids((2, 5), 100, 3)
    assert torch.equal(ids, random_ids((2, 5), 100, 3))
    assert not torch.equal(ids, random_ids((2, 5), 100, 4))


def test_the_first_step_is_told_once() -> None:
    watch = Stopwatch(0.0)
    first = watch.measure(lambda ids: ids.float().mean(), (1, 4), 10, 2)
    again = watch.measure(lambda ids: ids.float().mean(), (1, 4), 10, 2)
    assert first["first_step_s"] == again["first_step_s"] == watch.first_step_s


def test_auto_is_what_train_makes_of_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(device="cpu", dtype="bfloat16")
    work = train_step_ours.workload_of(str(checkpoint), config, (2, 16))
    assert (work.M, work.config.num_hidden_layers) == (32, 2)
    assert train_step_ours.plan_of("auto", config, work).policies == ("keep", "keep")
    assert train_step_ours.plan_of("offload", config, work).policies == ("offload",) * 2
    with pytest.raises(ValueError, match="got 'forget'"):
        train_step_ours.plan_of("forget", config, work)
    # on a GPU of 80 GiB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    config = replace(config, device="cuda")
    assert train_step_ours.plan_of("auto", config, work).policies == ("expand", "expand")
    with pytest.raises(ValueError, match="must fit"):
        train_step_ours.plan_of("auto:1MiB", config, work)


def test_a_named_shape_takes_what_a_checkpoint_of_it_takes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(train_step_ours.CONFIGS, "tiny", read_config(checkpoint))
    config = TrainConfig(device="cpu", dtype="bfloat16")
    folder, named = (
        train_step_ours.load(source, config, torch.device("meta")).frozen_tensors()
        for source in (str(checkpoint), "tiny")
    )
    # a family's dtypes are the file's, a named shape's are all that of the computation
    assert [tensor.shape for tensor in folder] == [tensor.shape for tensor in named]


def test_a_named_shape_is_measured_too(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(train_step_ours.CONFIGS, "tiny", read_config(checkpoint))
    # the process would set it for good
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    command = train_step.command_of(Provider("ours", "keep"), TINY, "tiny", ["1x8"], 2, checkpoint)
    monkeypatch.setattr(sys, "argv", command[2:])
    assert train_step_ours.main() == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["shape"], row["layers"]) == ("1x8", "2 keep")
    assert row["tokens_per_second"] > 0


def test_the_limit_of_a_tiny_step_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    config = read_config(tmp_path)
    assert train_step_limit.group_shapes(config, config.heads(0))["qkv"] == (64, 32)
    monkeypatch.setattr(train_step_limit, "MAX_HEAD_ROWS", 8)
    rows = train_step_limit.rows_of(config, "2x16", CPU)
    assert [row["policy"] for row in rows] == ["keep", "recompute"]
    keep, recompute = (row["ms_p50"] for row in rows)
    again = rows[0]["forward_ms"] + rows[0]["attention_forward_ms"]
    assert recompute - keep == pytest.approx(config.num_hidden_layers * again, abs=2e-3)


def test_a_window_has_its_share_of_the_limits_attention(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    config = read_config(tmp_path)
    # of four tokens the last two see two: 1 + 2 + 2 + 2 of 1 + 2 + 3 + 4
    assert train_step_limit.num_pairs(4, 2) == 7
    assert train_step_limit.num_pairs(4, None) == train_step_limit.num_pairs(4, 9) == 10
    half = replace(config, windows=(2, None))
    assert train_step_limit.share_of_pairs(4, 2) == pytest.approx(0.7)
    monkeypatch.setattr(train_step_limit, "attention", lambda *_: {"flash": (2.0, 4.0)})
    monkeypatch.setattr(train_step_limit, "MAX_HEAD_ROWS", 8)
    (row, _) = train_step_limit.rows_of(half, "2x4", CPU)
    assert (row["attention_forward_ms"], row["attention_backward_ms"]) == (1.7, 3.4)


def test_every_layer_counts_with_its_own_heads_in_the_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # 12 wide in a window of 8 tokens, then 16 wide with keys that are the values too
    fields = FIELDS | VARIANTS["gemma4"] | {"num_global_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_config(tmp_path)
    mlp = {"gate_up": (144, 32), "down": (32, 72)}
    first, second = (train_step_limit.group_shapes(config, config.heads(i)) for i in (0, 1))
    assert first == {"qkv": (4 * 12 + 2 * 2 * 12, 32), "o": (32, 48)} | mlp
    assert second == {"qkv": (4 * 16 + 2 * 16, 32), "o": (32, 64)} | mlp

    def products(shapes: Any, num_rows: int, *_: object) -> float:
        return num_rows * sum(rows * columns for rows, columns in shapes)

    def attention(_: object, heads: Heads, *__: object) -> dict[str, tuple[float, float]]:
        return {"cudnn" if heads.head_dim == 12 else "flash": (heads.head_dim, 3 * heads.head_dim)}

    monkeypatch.setattr(train_step_limit, "products", products)
    monkeypatch.setattr(train_step_limit, "attention", attention)
    keep, recompute = train_step_limit.rows_of(config, "1x16", CPU)
    # a window of 8 has 36 + 8 * 8 of 136 pairs
    forward = (12 * 100 / 136 + 16) / 2
    weights = (11520 + 12032) / 2
    assert keep["forward_ms"] == keep["backward_ms"] == 16 * weights
    assert keep["attention_forward_ms"] == pytest.approx(forward, abs=1e-4)
    assert keep["attention_backward_ms"] == pytest.approx(3 * forward, abs=1e-4)
    assert keep["attention"] == "cudnn, flash"
    head = 2 * 16 * 96 * 32
    assert keep["ms_p50"] == pytest.approx(2 * (2 * 16 * weights + 4 * forward) + head, abs=1e-3)
    again = recompute["ms_p50"] - keep["ms_p50"]
    assert again == pytest.approx(2 * (16 * weights + forward), abs=2e-3)


def test_heads_wider_than_torchs_kernels_take_have_the_time_of_narrower_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch)
    widths, attend = set(), train_step_limit.scaled_dot_product_attention

    def recorded(*heads: torch.Tensor, **flags: Any) -> torch.Tensor:
        widths.update(x.shape[-1] for x in heads)
        query, key, value = heads
        return attend(query, key, value, **flags)

    monkeypatch.setattr(train_step_limit, "scaled_dot_product_attention", recorded)
    narrow, wide, widest = (
        train_step_limit.attention(CONFIGS["smollm2-135m"], Heads(3, width, width), (1, 4), CPU)
        for width in (256, 512, 1024)
    )
    assert widths == {256}
    assert [ms / one for ms, one in zip(wide["math"], narrow["math"], strict=True)] == [2, 2]
    assert [ms / one for ms, one in zip(widest["math"], narrow["math"], strict=True)] == [4, 4]


def test_a_step_is_compared_with_the_limit_of_the_layers_that_stay() -> None:
    limits = [step_row("limit", "keep", "1x8", 200.0), step_row("limit", "recompute", "1x8", 100.0)]

    def reached(policy: str, layers: str, rows: list[dict[str, Any]] = limits) -> str:
        row = step_row("ours", policy, "1x8", 60.0, layers=layers)
        return train_step_lines([*rows, row])[1][-1][4]

    assert reached("auto", "20 expand, 28 keep") == "30 %"
    assert reached("auto:8GiB", "3 recompute, 45 offload") == "60 %"
    # half of the time of the one limit and half of the other: 1 / 200 and 1 / 100
    assert reached("auto", "4 expand, 4 keep, 8 offload") == "45 %"
    # a peer has no plan
    peers = [step_row("unsloth", policy, "1x8", 60.0) for policy in ("keep", "offload")]
    lines = train_step_lines([*limits, *peers])[1]
    assert [line[4] for line in lines] == ["100 %", "100 %", "30 %", "60 %"]
    # one limit is enough for those that it is of
    for index, policy, layers in ((0, "auto", "2 keep"), (1, "offload", "2 offload")):
        assert reached(policy, layers, [limits[index]]) != "-"
        assert reached(policy, layers, [limits[1 - index]]) == "-"
    assert reached("auto", "1 keep, 1 offload", limits[:1]) == "-"


def test_without_peers_no_checkpoint_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[tuple[str, list[str]]] = []

    def measure(bench: Bench, providers: list[Provider], record: Any, path: None) -> None:
        measured.append((bench.model, [provider.name for provider in providers]))
        record |= {"rows": []}

    def prepare(folder: Path, fields: dict[str, Any]) -> Path:
        return folder

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train_step, "head", lambda *_: dict.fromkeys(("device", "torch", "triton")))
    monkeypatch.setattr(train_step, "measure_all", measure)
    monkeypatch.setattr(train_step, "prepare_checkpoint", prepare)
    folder = str(tmp_path / "given")
    for flags in (["--peers", ""], ["--peers", "", "--model", folder], ["--peers", "hf"]):
        monkeypatch.setattr(sys, "argv", ["train_step", "--ours", "keep", *flags])
        assert train_step.main() == 0
    drawn, given, shared = measured
    assert drawn == ("llama-3-8b", ["limit", "ours"])
    assert given == (folder, ["limit", "ours"])
    assert shared[0].endswith("/llama-3-8b")
    assert shared[1] == ["limit", "ours", "hf"]


def test_the_limit_in_fp8_is_of_the_groups_that_fp8_multiplies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps(FIELDS | {"intermediate_size": 48}))
    config, called = read_config(tmp_path), []

    def groups(config: LlamaConfig, base_compute: str, is_backward: bool) -> set[str]:
        return train_step_limit.fp8_groups(config, config.heads(0), base_compute, is_backward)

    assert groups(config, "fp8", False) == {"gate_up", "down"}
    assert groups(config, "fp8-backward", False) == groups(config, "bf16", True) == set()
    # sizes that are no multiples of 16
    odd = replace(config, intermediate_size=68)
    assert groups(odd, "fp8", False) == set()
    assert groups(odd, "fp8", True) == {"qkv", "o"}

    def product(x: Fp8Rows, w: Fp8Weight, scales: tuple[torch.Tensor, ...]) -> torch.Tensor:
        called.append((tuple(x.values.shape), tuple(w.values.shape)))
        return x.values.float() @ w.values.float().T

    monkeypatch.setattr(train_step_limit, "torch_fp8", product)
    train_step_limit.rows_of(config, "2x16", CPU, "fp8")
    # there and back, both along what is added up
    forward = {((32, 32), (96, 32)), ((32, 48), (32, 48))}
    back = {((32, 64), (32, 64)), ((32, 32), (32, 32)), ((32, 96), (32, 96)), ((32, 32), (48, 32))}
    assert {*called} == forward | back
    experts = replace(config, experts=CONFIGS["qwen3-30b-a3b"].experts)
    assert groups(experts, "fp8", True) == {"qkv", "o"}


def test_base_products_in_fp8_are_planned_and_measured_as_train_does(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(device="cpu", dtype="bfloat16", base_compute="fp8")
    work = train_step_ours.workload_of(str(checkpoint), config, (2, 16))
    assert all(group.fp8_scale is not None for _, group in work.model.groups())
    recipe = replace(TINY, base_compute="fp8")
    for name in ("limit", "ours"):
        provider = Provider(name, "keep")
        command = train_step.command_of(provider, recipe, "m", ["1x8"], 2, checkpoint)
        assert command[-2:] == ["--base-compute", "fp8"]


def test_the_limit_has_the_experts_of_a_token_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FIELDS | VARIANTS["mixtral"]))
    config = read_config(tmp_path)
    shapes = train_step_limit.group_shapes(config, config.heads(0))
    # two of four, each 24 wide
    assert (shapes["gate_up"], shapes["down"]) == ((96, 32), (32, 48))


def test_tables_put_providers_beside_the_limit() -> None:
    rows = [
        step_row("limit", "keep", "1x8", 200.0),
        step_row("limit", "recompute", "1x8", 100.0),
        step_row("ours", "offload", "1x8", 80.0, peak_gib=5.04, load_s=2.0, first_step_s=9.0),
        {"provider": "ours", "policy": "offload", "shape": "2x8", "error": "out of memory: x"},
        {"provider": "hf", "policy": "recompute", "shape": "1x8", "error": "No module named 'x'"},
        {"provider": "hf", "policy": "recompute", "shape": "2x8", "error": "exit code 1"},
    ]
    lines = train_step_lines(rows)[1]
    assert lines[2] == [
        "ours",
        "offload",
        "1x8",
        "80",
        "80 %",
        "1.0",
        "5.04",
        "-",
        "2.0",
        "9.0",
        "",
    ]
    assert lines[3][3:6] == ["-", "-", "-"]
    assert aligned(*train_step_lines(rows)).count("\n") == 6
    header, wide = train_step_table(rows)
    assert header == ["", "1 x 8", "2 x 8", "load s", "first step s"]
    assert wide == [
        ["limit, keep", "200", "-", "-", "-"],
        ["limit, recompute", "100", "-", "-", "-"],
        ["Quatrain, offload", "80, 5.0 GiB", "does not fit", "2.0", "9.0"],
        ["transformers + PEFT + bitsandbytes, recompute", "not installed", "failed", "-", "-"],
    ]
