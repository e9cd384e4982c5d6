"""train.py: accumulation, evaluation, resuming, what is written, and what is refused."""

import json
import math
import shutil
from collections.abc import Container
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.equality import assert_equal
from support.merge_cases import write_adapter
from support.micro_steps import in_runs
from support.short_model import short_model

import train
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from data.batches import collate, epoch_order
from data.packing import collate_packed
from data.samples import NO_LOSS, Sample
from lora.config import LoRAConfig
from nf4.weight import Quantization
from optim.adamw import AdamW
from optim.arena import GradientArena
from prepare.job import BUNDLED
from run.config import CONFIG_FILE, TrainConfig
from run.ranks import Ranks
from step.micro_step import MicroStep

FEW = (
    "--device cpu --batch-size 2 --gradient-accumulation-steps 2 --max-steps 4 --lora-r 4 "
    "--no-packing"
)
METRICS_KEYS = {
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "target_tokens",
    "tokens_per_second",
    "peak_memory_bytes",
}
HOST = "--optimizer-residency host"
CLOCK = ("tokens_per_second", "peak_memory_bytes")


def small_data(folder: Path, count: int = 12) -> Path:
    lines = (BUNDLED / "data.jsonl").read_text().splitlines()[: 5 * count : 5]
    path = folder / "small.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(
    folder: Path, flags: str, name: str = "out", data: Path | None = None
) -> list[dict[str, Any]]:
    data = data or small_data(folder)
    output = folder / name
    train.main(f"--model {short_model()} --data {data} --output {output} {FEW} {flags}".split())
    return rows_of(output)


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_adapter(folder: Path, other: Path) -> None:
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_equal(ours[name], theirs[name], name)


def rounding_of_a_loss(dtype: str) -> float:
    """One unit in the last place of the largest logit, about 16."""
    return 16 * torch.finfo(getattr(torch, dtype)).eps


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


@pytest.mark.draws
def test_the_loss_falls_and_everything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(tmp_path)
    prompt = "--sample-prompt Hello --max-steps 12 --learning-rate 3e-3 --save-steps 5"
    rows = run(tmp_path, f"--eval-data {data} --eval-steps 6 {prompt}")
    assert [row["step"] for row in rows] == list(range(13))
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 6, 12]
    assert all(set(row) - {"eval_loss"} == METRICS_KEYS for row in rows[1:])
    assert rows[-1]["eval_loss"] < 0.8 * rows[0]["eval_loss"]
    output = tmp_path / "out"
    written = {path.name for path in output.iterdir()}
    assert written == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint-10",
        "checkpoint-5",
        "data.json",
        "loss.png",
        "metrics.jsonl",
        "run.json",
        "samples.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    said = capsys.readouterr().out
    for part in ("parameters, ", "messages (detected)", "12 samples, ", "before", "after"):
        assert part in said


def test_how_a_step_is_split_into_micro_batches_does_not_change_it(tmp_path: Path) -> None:
    # 12 samples in steps of 8: the second step of an epoch is short, and samples differ in length
    flags = "--max-steps 4 --dtype float32 --quant none --lr-scheduler constant"
    many = run(tmp_path, f"{flags} --batch-size 1 --gradient-accumulation-steps 8", "many")
    one = run(tmp_path, f"{flags} --batch-size 8 --gradient-accumulation-steps 1", "one")
    for a, b in zip(many, one, strict=True):
        assert (a["tokens"], a["target_tokens"]) == (b["tokens"], b["target_tokens"])
        # float32 sums in another order, fed back through AdamW's normalized step
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    num_targets = [row["target_tokens"] for row in many]
    assert num_targets[1] - num_targets[0] < num_targets[0]


@pytest.fixture(scope="module")
def trained() -> tuple[MicroStep, AdamW]:
    model = load_model(open_checkpoint(short_model()), torch.device("cpu"), torch.float32, None)
    model.attach_lora(LoRAConfig(4, 8.0, 0.0, ("q_proj", "down_proj")), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.adapter_tensors().items():
        if name.endswith("lora_B.weight"):
            # a new one is zero, and lets nothing through to lora_A
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = GradientArena(parameters)
    micro_step = MicroStep(model, gradients, ["keep" for _ in model.layers])
    return micro_step, AdamW(gradients, weight_decay=0.0)


@settings(max_examples=30, deadline=None)
@given(
    samples=st.lists(
        st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=2, max_size=12),
        min_size=1,
        max_size=9,
    ).filter(lambda samples: any(learned for sample in samples for _, learned in sample[1:])),
    batch_size=st.integers(1, 4),
    num_ranks=st.integers(1, 3),
    packed=st.booleans(),
)
def test_micro_batches_of_all_ranks_add_up_to_the_gradient_of_the_whole_window(
    trained: tuple[MicroStep, AdamW],
    samples: list[list[Quantization]],
    batch_size: int,
    num_ranks: int,
    packed: bool,
) -> None:
    micro_step, optimizer = trained
    window = [
        Sample(
            [token for token, _ in some], [token if learned else -100 for token, learned in some]
        )
        for some in samples
    ]
    whole = collate(window)
    num_targets = int((whole.labels[:, 1:] != NO_LOSS).sum())
    factor = torch.tensor(1 / num_targets)
    optimizer.gradients.zero_()
    loss = float(micro_step(whole, factor))
    expected = optimizer.gradients.values.clone()
    optimizer.gradients.zero_()
    parts = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    total = 0.0
    for rank in range(num_ranks):
        for _, part in Ranks(rank, num_ranks).share(parts):
            batch = collate_packed([part], 50) if packed else collate(part)
            total += float(micro_step(batch, factor))
    # float32: each element is a sum of a few hundred products in another order
    assert total == pytest.approx(loss, rel=300 * 2**-24)
    assert expected.abs().max() > 0
    error = (optimizer.gradients.values - expected).abs().max() / expected.abs().max()
    assert error < 300 * 2**-24


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--lora-dropout 0.3 --activations recompute",
        "--optim paged_adamw_8bit --lora-r 16 --loraplus-lr-ratio 4",
        "--neftune-noise-alpha 5",
        "--neftune-noise-alpha 5 --packing --max-length 128",
        "--packing --max-length 100 --batch-size 1",
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, flags: str) -> None:
    flags += " --max-steps 7 --save-steps 3 --dtype float32"
    expected = run(tmp_path, flags)
    broken, whole = tmp_path / "out", tmp_path / "whole"
    shutil.copytree(broken, whole)
    # as if killed after step 4: later checkpoints and results are not there yet
    for path in (broken / "checkpoint-6").iterdir():
        path.unlink()
    (broken / "checkpoint-6").rmdir()
    (broken / "adapter_model.safetensors").unlink()
    actual = run(tmp_path, f"{flags} --resume")
    assert timeless(actual) == timeless(expected)
    assert_same_adapter(broken, whole)


def test_an_epoch_is_evaluated_and_saved_at_its_end_also_by_a_resumed_run(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    flags = f"--eval-data {data} --eval-strategy epoch --save-strategy epoch --epochs 2.5"
    flags += " --max-steps -1 --warmup-steps 8 --learning-rate 0.008 --packing --max-length 64"
    flags += " --early-stopping-patience 9 --batch-size 1 --gradient-accumulation-steps 1"
    # four of the 12 samples are 2 steps, then 3, then 2
    part = Path(f"{data}=0.3")
    expected = run(tmp_path, flags, "whole", part)
    assert [row["step"] for row in expected if "eval_loss" in row] == [0, 2, 5, 6]
    rates = [row["learning_rate"] for row in expected[1:]]
    assert rates == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.005, 0.006], rel=1e-12)
    saved = sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert saved == ["checkpoint-2", "checkpoint-5"]
    adapter = tmp_path / "whole" / "adapter_model.safetensors"
    as_trained = adapter.read_bytes()
    adapter.unlink()
    actual = run(tmp_path, f"{flags} --resume", "whole", part)
    assert timeless(actual) == timeless(expected)
    assert adapter.read_bytes() == as_trained


def test_recomputed_activations_change_no_bit(tmp_path: Path) -> None:
    kept = run(tmp_path, "--activations keep --lora-dropout 0.2", "keep")
    recomputed = run(tmp_path, "--activations recompute --lora-dropout 0.2", "recompute")
    assert timeless(kept) == timeless(recomputed)


def test_noise_on_embeddings_is_the_steps_own(tmp_path: Path) -> None:
    noisy = run(tmp_path, "--neftune-noise-alpha 5", "noisy")
    plain = run(tmp_path, "", "plain")
    assert all(a["loss"] != b["loss"] for a, b in zip(noisy, plain, strict=True))
    # neither is the noise that of another micro-batch, nor does it depend on what a layer keeps
    recomputed = run(tmp_path, "--neftune-noise-alpha 5 --activations recompute", "recomputed")
    assert timeless(recomputed) == timeless(noisy)


def test_a_seed_decides_the_run(tmp_path: Path) -> None:
    first, again = run(tmp_path, "--seed 1", "a"), run(tmp_path, "--seed 1", "b")
    other = run(tmp_path, "--seed 2", "c")
    assert timeless(first) == timeless(again)
    assert timeless(first) != timeless(other)


def test_no_two_micro_batches_have_one_dropout_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, seeds = MicroStep.__call__, list[int]()

    def recorded(self: MicroStep, *args: Any) -> torch.Tensor:
        _, _, seed, *_ = args
        seeds.append(seed)
        return compute(self, *args)

    monkeypatch.setattr(MicroStep, "__call__", in_runs(recorded, "__call__"))
    for seed in (1, 2):
        run(tmp_path, f"--seed {seed} --max-steps 3", f"seed-{seed}")
    # 3 steps of 2 micro-batches each
    assert len(seeds) == 2 * 3 * 2
    assert len(set(seeds)) == len(seeds)


def test_moments_are_fetched_once_a_step_beside_its_last_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[str]()

    def record(owner: type, name: str) -> None:
        function = getattr(owner, name)

        def recorded(*args: Any) -> Any:
            calls.append(name)
            return function(*args)

        place = in_runs(recorded, name) if owner is MicroStep else recorded
        monkeypatch.setattr(owner, name, place)

    record(MicroStep, "__call__")
    record(AdamW, "prefetch")
    run(tmp_path, "--gradient-accumulation-steps 3 --max-steps 2")
    assert calls == ["__call__", "__call__", "prefetch", "__call__"] * 2


def test_a_rank_without_micro_batches_fetches_its_moments_before_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[str]()
    for name in ("prefetch", "step"):
        function = getattr(AdamW, name)

        def recorded(*args: Any, name: str = name, function: Any = function) -> Any:
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(AdamW, name, recorded)
    monkeypatch.setattr(Ranks, "share", lambda self, items: [])
    run(tmp_path, "--max-steps 2")
    assert calls == ["prefetch", "step"] * 2


def test_a_step_is_taken_at_its_own_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, taken = AdamW.step, list[float]()

    def recorded(self: AdamW, learning_rate: float, *args: Any) -> torch.Tensor:
        taken.append(learning_rate)
        return step(self, learning_rate, *args)

    monkeypatch.setattr(AdamW, "step", recorded)
    rows = run(tmp_path, "--learning-rate 8e-4 --warmup-ratio 0.5 --lr-scheduler linear")
    # two steps up to the rate, two down from it
    assert taken == [4e-4, 8e-4, 8e-4, 4e-4]
    assert [row["learning_rate"] for row in rows] == taken


def test_rows_count_tokens_targets_and_epochs_of_the_run(tmp_path: Path) -> None:
    records = [
        {"input_ids": [1, *range(3, 3 + n)], "labels": [-100] * n + [2 + n]} for n in (9, 5, 12)
    ]
    data = tmp_path / "ids.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = run(tmp_path, "--max-steps 3", data=data)
    # steps of four samples: an epoch is one, of all three
    for step, row in enumerate(rows, start=1):
        counts = (row["tokens"], row["target_tokens"], row["epoch"])
        assert counts == (step * (10 + 6 + 13), step * 3, step)


def test_a_step_over_all_samples_is_the_same_packed(tmp_path: Path) -> None:
    flags = "--dtype float32 --batch-size 12 --gradient-accumulation-steps 1 --max-steps 2"
    alone = run(tmp_path, flags, "alone")
    packed = run(tmp_path, f"{flags} --packing --max-length 100", "packed")
    for one, other in zip(alone, packed, strict=True):
        for name in ("tokens", "target_tokens", "epoch"):
            assert one[name] == other[name]
        for name in ("loss", "grad_norm"):
            # sums over some hundred tokens in another order
            assert one[name] == pytest.approx(other[name], rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_training_follows_float32(tmp_path: Path, dtype: str) -> None:
    wide = run(tmp_path, "--dtype float32", "wide")
    narrow = run(tmp_path, f"--dtype {dtype}", "narrow")
    for a, b in zip(wide, narrow, strict=True):
        assert abs(a["loss"] - b["loss"]) < rounding_of_a_loss(dtype)
    assert [row["step"] for row in narrow] == [1, 2, 3, 4]


def test_max_steps_0_evaluates_only(tmp_path: Path) -> None:
    rows = run(tmp_path, f"--max-steps 0 --eval-data {small_data(tmp_path)}")
    assert [set(row) for row in rows] == [
        {"step", "epoch", "tokens", "target_tokens", "eval_loss", "peak_memory_bytes"}
    ]
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_eval_loss_is_the_mean_over_the_tokens_that_have_a_label(tmp_path: Path) -> None:
    samples = []
    for length in (9, 30, 17):
        ids = [1, *torch.randint(3, 300, (length,)).tolist()]
        # a third of them is learned
        samples.append(Sample(ids, [i if n % 3 == 1 else -100 for n, i in enumerate(ids)]))
    records = [{"input_ids": s.input_ids, "labels": s.labels} for s in samples]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    flags = f"--max-steps 0 --dtype float32 --quant none --eval-data {tmp_path / 'eval.jsonl'}"
    (row,) = run(tmp_path, flags)
    model = load_model(open_checkpoint(short_model()), torch.device("cpu"), torch.float32, None)
    losses = []
    for sample in samples:
        logits = model.logits(torch.tensor([sample.input_ids]))[0]
        losses += [
            float(F.cross_entropy(before, torch.tensor(label)))
            for before, label in zip(logits, sample.labels[1:], strict=False)
            if label != -100
        ]
    # float32 sums over some tens of tokens in another order
    assert row["eval_loss"] == pytest.approx(fmean(losses), rel=1e-5)


def test_an_evaluation_is_the_same_packed(tmp_path: Path) -> None:
    flags = f"--max-steps 0 --dtype float32 --eval-data {small_data(tmp_path)}"
    (alone,) = run(tmp_path, flags, "alone")
    (packed,) = run(tmp_path, f"{flags} --packing --max-length 100 --batch-size 3", "packed")
    # sums over some hundred tokens in another order
    assert packed["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)


def overflow_in(monkeypatch: pytest.MonkeyPatch, steps: Container[int]) -> None:
    """Let the gradients of some steps overflow, counted from 1."""
    step = AdamW.step
    calls = []

    def overflow(self: AdamW, *args: Any) -> torch.Tensor:
        calls.append(len(calls))
        if len(calls) in steps:
            self.gradients.values.fill_(float("inf"))
        return step(self, *args)

    monkeypatch.setattr(AdamW, "step", overflow)


def test_a_step_whose_gradients_are_not_finite_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overflow_in(monkeypatch, {2})
    rows = run(tmp_path, "--dtype float32 --save-steps 1")
    assert rows[1]["grad_norm"] is None
    assert "step 2: the gradients are not finite" in capsys.readouterr().out
    before, after = (
        load_file(tmp_path / "out" / f"checkpoint-{n}" / "adapter_model.safetensors")
        for n in (1, 2)
    )
    for name in before:
        assert_equal(after[name], before[name], name)
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "state.json").read_text())
    assert (state["num_updates"], state["num_skipped"]) == (2, 1)


@pytest.mark.parametrize("flags", ["", "--logging-steps 100"])
def test_diverged_training_stops_and_leaves_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    overflow_in(monkeypatch, {1, 3, 4, 5})
    with pytest.raises(train.CannotGoOn, match=r"3 steps in a row were not, up to step 5 .*its"):
        run(tmp_path, f"--max-bad-steps 3 --max-steps 9 {flags}")
    record = json.loads((tmp_path / "out" / "bad-step-5.json").read_text())
    assert record["step"] == 5
    assert record["grad_norm"] == "inf"
    # 12 samples in steps of 4: the second step of the second epoch
    order = epoch_order(12, 1, 42, True)
    assert [sample["index"] for sample in record["samples"]] == order[4:8]
    lines = small_data(tmp_path).read_text().splitlines()
    for sample in record["samples"]:
        said = json.loads(lines[sample["index"]])["messages"][-1]["content"]
        assert said in sample["text"]
        assert len(sample["labels"]) == len(sample["input_ids"])


def test_what_is_logged_seldom_is_counted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--dtype float16 --max-steps 6 --save-steps 3"
    overflow_in(monkeypatch, {1, 2, 5})
    often = run(tmp_path, flags, "often")
    overflow_in(monkeypatch, {1, 2, 5})
    seldom = run(tmp_path, f"{flags} --logging-steps 4", "seldom")
    assert timeless(seldom) == [row for row in timeless(often) if row["step"] in (4, 6)]
    assert_same_adapter(tmp_path / "seldom", tmp_path / "often")
    said = capsys.readouterr().out
    for step in (1, 2, 5):
        assert said.count(f"step {step}: the gradients are not finite") == 2
    states = [
        json.loads((tmp_path / name / "checkpoint-3" / "state.json").read_text())
        for name in ("often", "seldom")
    ]
    assert states[0] | {"started": ""} == states[1] | {"started": ""}
    assert (states[0]["num_skipped"], states[0]["loss_scale"]) == (2, 65536.0 / 4)


def test_float16_finds_its_scale_and_a_resumed_run_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # gradients of float16 overflow under such a scale, without any help
    monkeypatch.setattr("optim.loss_scale.INITIAL_SCALE", 2.0**24)
    monkeypatch.setattr("optim.loss_scale.GROWTH_INTERVAL", 3)
    flags = "--dtype float16 --max-steps 16 --save-steps 1 --learning-rate 1e-3"
    expected = run(tmp_path, flags)
    broken, whole = tmp_path / "out", tmp_path / "whole"
    shutil.copytree(broken, whole)
    states = [
        json.loads((whole / f"checkpoint-{n}" / "state.json").read_text()) for n in range(1, 16)
    ]
    scale, num_good = 2.0**24, 0
    for row, state in zip(expected, states, strict=False):
        is_skipped = row["grad_norm"] is None
        num_good = 0 if is_skipped else num_good + 1
        scale *= 0.5 if is_skipped else 2.0 if num_good == 3 else 1.0
        num_good %= 3
        assert (state["loss_scale"], state["num_good_steps"]) == (scale, num_good)
    skipped = [row["step"] for row in expected if row["grad_norm"] is None]
    # overflows first, then steps that learn, after which it grew and was too large again
    assert skipped[0] == 1
    assert len(skipped) < 12
    assert any(b["loss_scale"] > a["loss_scale"] for a, b in pairwise(states))
    assert states[-1]["num_skipped"] == len([n for n in skipped if n < 16])
    assert states[-1]["num_updates"] == 15 - states[-1]["num_skipped"]
    # resumed between a skipped step and the next one
    kept = skipped[-1]
    for n in range(kept + 1, 16):
        shutil.rmtree(broken / f"checkpoint-{n}")
    (broken / "adapter_model.safetensors").unlink()
    assert timeless(run(tmp_path, f"{flags} --resume")) == timeless(expected)
    assert_same_adapter(broken, whole)


def test_8_bit_moments_train_as_well_as_32_bit_ones(tmp_path: Path) -> None:
    # of a rank at which tensors are large enough for 8 bits, and of all layers of the bundled model
    flags = f"--model {BUNDLED / 'model'} --lora-r 32 --gradient-accumulation-steps 1"
    flags += " --epochs 12 --max-steps -1 --save-steps 0 --learning-rate 3e-4"
    exact, coarse = (
        [row["loss"] for row in run(tmp_path, f"{flags} --optim {optim}", optim)]
        for optim in ("adamw", "paged_adamw_8bit")
    )
    assert coarse != exact
    # far from where it started
    assert fmean(exact[-24:]) < 0.3 * fmean(exact[:6])
    assert fmean(coarse) == pytest.approx(fmean(exact), rel=0.005)
    assert fmean(coarse[-24:]) == pytest.approx(fmean(exact[-24:]), rel=0.005)


def test_paged_and_ordinary_moments_give_the_same_bits_on_a_cpu(tmp_path: Path) -> None:
    paged = run(tmp_path, "--optim paged_adamw_32bit", "paged")
    assert timeless(run(tmp_path, "--optim adamw", "plain")) == timeless(paged)
    assert_same_adapter(tmp_path / "plain", tmp_path / "paged")


def test_moments_decay_as_the_flags_say() -> None:
    model: Any = torch.nn.Linear(2, 3)
    config = TrainConfig(adam_beta1=0.5, adam_beta2=0.75, device="cpu", optim="adamw")
    optimizer = train.make_optimizer(model, config)
    for gradient in (1.0, 0.0):
        optimizer.gradients.zero_()
        model.weight.grad.fill_(gradient)
        optimizer.step(1e-3)
    moments = optimizer.state_tensors()
    assert moments["exp_avg.weight"].eq(0.5 * 0.5).all()
    assert moments["exp_avg_sq.weight"].eq(0.75 * 0.25).all()


def test_loraplus_lets_lora_b_learn_faster(tmp_path: Path) -> None:
    flags = "--max-steps 1 --warmup-ratio 0 --learning-rate 1e-4"
    run(tmp_path, f"{flags} --loraplus-lr-ratio 16", "plus")
    run(tmp_path, flags, "plain")
    plus, plain = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plus", "plain"))
    for name, tensor in plain.items():
        # B starts at zero, so its first step is the learning rate; A has no gradient yet
        expected = 16 * tensor if "lora_B" in name else tensor
        torch.testing.assert_close(plus[name], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--target-modules q_porj", "did you mean q_proj"),
        ("--max-length 100000", "--max-length must be at most the model's"),
        ("--device cuda", "--device cuda must find a GPU"),
        ("--optimizer-residency host", "--optimizer-residency must be auto on a CPU"),
        ("--optimizer-residency host --optim adamw", "must be auto with --optim adamw"),
        ("--max-memory 24g", "--max-memory must be a size such as 24GiB"),
        ("--max-memory 24GiB", "must be given for a GPU: the device is the CPU"),
        ("--activations offload", "must be given for a GPU: the device is the CPU"),
        ("--loraplus-lr-ratio 0", "--loraplus-lr-ratio must be positive"),
        ("--max-steps 0", "--max-steps 0 evaluates only and must be given --eval-data"),
        ("--block-size 48", "block_size must be one of"),
        ("--init-adapter nowhere", "adapter"),
        ("--eval-data nowhere.jsonl", "nowhere.jsonl"),
        ("--chat-template nowhere", "--chat-template must be"),
    ],
)
def test_bad_flags_are_refused_and_leave_no_folder(
    tmp_path: Path, flags: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        run(tmp_path, flags)
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_the_template_refuses_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ raise_exception('no prompts') }}{% endif %}"
    )
    with pytest.raises(ValueError, match=r"x\.jinja: at message 0 .* raised 'no prompts'"):
        run(tmp_path, f"--chat-template {tmp_path / 'x.jinja'} --sample-prompt hi")
    assert not (tmp_path / "out").exists()


def test_an_adapter_to_start_from_must_have_the_asked_shape(tmp_path: Path) -> None:
    run(tmp_path, "", "first")
    message = r"--lora-r must be as in the adapter .*first has 4, the settings have 8; leave"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, f"--init-adapter {tmp_path / 'first'} --lora-r 8", "second")
    first = run(tmp_path, f"--init-adapter {tmp_path / 'first'}", "third")
    assert first[0]["loss"] < rows_of(tmp_path / "first")[0]["loss"]


def test_an_rslora_run_leaves_its_function_and_the_next_run_begins_with_it(tmp_path: Path) -> None:
    first = tmp_path / "first"
    data = f"--eval-data {small_data(tmp_path)}"
    shape = "--lora-r 8 --lora-alpha 12 --use-rslora --target-modules v_proj,up_proj"
    learn = f"{data} {shape} --learning-rate 1e-2 --save-steps 2"
    rows = run(tmp_path, learn, "first")
    fields = json.loads((first / "adapter_config.json").read_text())
    assert (fields["use_rslora"], fields["lora_alpha"] / 8) == (False, 12 / math.sqrt(8))
    # cut off, it goes on with the same bytes
    saved = (first / "adapter_model.safetensors").read_bytes()
    (first / "adapter_model.safetensors").unlink()
    run(tmp_path, f"{learn} --resume", "first")
    assert (first / "adapter_model.safetensors").read_bytes() == saved
    # the flags that made it mean the same as its own rank, alpha and targets
    for name, flags in {"second": "--lora-r 8", "third": shape}.items():
        begun = run(tmp_path, f"{data} --save-steps 1 --init-adapter {first} {flags}", name)[0]
        assert begun["eval_loss"] == rows[-1]["eval_loss"]
        again = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert again == fields | {"target_modules": again["target_modules"]}
    path = tmp_path / "second" / CONFIG_FILE
    config = json.loads(path.read_text())
    assert (config["lora_r"], config["lora_alpha"]) == (8, fields["lora_alpha"])
    assert (config["target_modules"], config["use_rslora"]) == ("v_proj,up_proj", False)
    # the file that the run wrote goes on with it
    (tmp_path / "second" / "adapter_model.safetensors").unlink()
    train.main(["--config", str(path), "--resume"])


@pytest.mark.parametrize("save_steps", [0, 1], ids=["no-checkpoint", "a-checkpoint"])
def test_a_finished_run_says_so_and_is_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], save_steps: int
) -> None:
    run(tmp_path, f"--max-steps 2 --save-steps {save_steps}", "out")
    output = tmp_path / "out"
    left = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    capsys.readouterr()
    train.main(["--resume", str(output)])
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == f"{output} is finished since step 2, its adapter is there: nothing to resume"
    assert second == f"to train it further, start a new run with --init-adapter {output}"
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == left
    longer = rf"--max-steps was 2, now 9; .* another --output, with --init-adapter {output}$"
    with pytest.raises(ValueError, match=longer):
        train.main(["--resume", str(output), "--max-steps", "9"])
    # without its last file it counts as cut off: with a checkpoint it can go on
    (output / "README.md").unlink()
    if save_steps:
        train.main(["--resume", str(output)])
        assert (output / "README.md").is_file()
    else:
        cut = r"has its adapter and no checkpoint; .*--init-adapter"
        with pytest.raises(ValueError, match=cut):
            train.main(["--resume", str(output)])


def test_an_adapter_with_the_bases_embeddings_goes_on_and_with_others_does_not(
    tmp_path: Path,
) -> None:
    run(tmp_path, "", "first")
    expected = run(tmp_path, f"--init-adapter {tmp_path / 'first'}", "second")
    path = tmp_path / "first" / "adapter_model.safetensors"
    saved = {name: tensor.clone() for name, tensor in load_file(path).items()}
    embeddings = load_file(short_model() / "model.safetensors")["model.embed_tokens.weight"]
    # as PEFT saves them where the vocabulary was resized
    saved["base_model.model.model.embed_tokens.weight"] = embeddings.clone()
    save_file(saved, path)
    rows = run(tmp_path, f"--init-adapter {tmp_path / 'first'}", "third")
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    saved["base_model.model.model.embed_tokens.weight"][0, 0] += 1
    save_file(saved, path)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight must equal the base's"):
        run(tmp_path, f"--init-adapter {tmp_path / 'first'}", "fourth")


def test_an_adapter_with_patterns_goes_on_with_them(tmp_path: Path) -> None:
    shapes = {"self_attn.q_proj": (128, 128), "self_attn.v_proj": (64, 128)}
    config = {
        "r": 4,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [1, 3],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.3.self_attn.v_proj": 8},
    }
    tensors = {}
    for layer in (1, 3):
        for name, (rows, columns) in shapes.items():
            rank = 2 if "q_proj" in name else 4
            path = f"model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, columns)
            tensors[f"{path}.lora_B.weight"] = torch.zeros(rows, rank)
    write_adapter(tmp_path / "first", config, tensors)
    # of the model with all its layers
    flags = f"--model {BUNDLED / 'model'} --init-adapter {tmp_path / 'first'} --save-steps 2"
    message = "--target-modules must be .*first has q_proj,v_proj, the settings have all-linear"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, f"{flags} --target-modules all-linear", "second")
    rows = run(tmp_path, f"{flags} --learning-rate 1e-2", "third")
    assert rows[-1]["loss"] < rows[0]["loss"]
    saved = load_file(tmp_path / "third" / "adapter_model.safetensors")
    before = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in before.items()}
    assert not any(torch.equal(tensor, before[name]) for name, tensor in saved.items())
    fields = json.loads((tmp_path / "third" / "adapter_config.json").read_text())
    assert config.items() <= fields.items()
    # and so does a run that was cut off
    (tmp_path / "third" / "adapter_model.safetensors").unlink()
    run(tmp_path, f"{flags} --learning-rate 1e-2 --resume", "third")
    again = load_file(tmp_path / "third" / "adapter_model.safetensors")
    for name, tensor in saved.items():
        assert_equal(again[name], tensor, name)


def test_a_plan_says_what_the_run_takes_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(tmp_path)
    arguments = f"--model {short_model()} --data {data} --output {tmp_path / 'out'} {FEW}"
    train.main(f"{arguments} --plan".split())
    said = capsys.readouterr().out
    assert "plan for micro-batches of 2 x" in said
    for part in ("weights", "adapter", "gradients", "activations and scratch", "2 keep"):
        assert f"  {part}" in said
    assert "4 steps over about" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "optim",
    [
        "paged_adamw_32bit",
        f"paged_adamw_32bit {HOST}",
        f"paged_adamw_8bit --lora-r 16 {HOST}",
        "adamw",
        "adamw --packing --max-length 100",
    ],
)
def test_gpu_training_follows_the_cpus_and_resumes_bit_for_bit(
    tmp_path: Path, dtype: str, optim: str
) -> None:
    on_cpu = run(tmp_path, f"--dtype float32 --optim {optim.replace(HOST, '')}", "cpu")
    flags = f"--device cuda --deterministic --dtype {dtype} --save-steps 2 --optim {optim}"
    expected = run(tmp_path, flags, "whole")
    for a, b in zip(on_cpu, expected, strict=True):
        # as between micro-batches in float32, as between dtypes in 16 bit
        bound = 1e-5 * a["loss"] if dtype == "float32" else rounding_of_a_loss(dtype)
        assert abs(a["loss"] - b["loss"]) < bound
    run(tmp_path, flags, "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").unlink()
    assert timeless(run(tmp_path, f"{flags} --resume", "broken")) == timeless(expected)
    assert_same_adapter(tmp_path / "broken", tmp_path / "whole")
