"""train.py where memory ends, in processes of their own: the run is saved, or its last checkpoint
is whole, the message names what to do, and the exit is an error of one line."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.micro_steps import in_runs
from support.train_process import TrainProcess, train_ranks
from test_train_faults import ADAPTER, assert_equals, flags, last_step
from test_train_ranks import flags as rank_flags

import checkpoint.loading
import train
import training.answers
from kernels.launch import KernelDoesNotFit
from llama.layer import DecoderLayer
from optim.adamw import AdamW
from step.micro_step import MicroStep

# what an allocator says, and what CUDA's runtime says of memory that torch's allocator has not
ALLOCATOR = "CUDA out of memory. Tried to allocate 2.00 GiB"
RUNTIME = "CUDA error: out of memory"
NUM_STEPS = 7


def at_call(number: int, before: Callable[[], None], owner: Any, name: str) -> None:
    """Let something happen before the n-th call of a method, counted from 1."""
    method, calls = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            before()
        return method(*args, **kwargs)

    setattr(owner, name, in_runs(counted, name) if owner is MicroStep else counted)


def refuse(message: str) -> None:
    raise torch.OutOfMemoryError(message) if message == ALLOCATOR else RuntimeError(message)


def refuse_while_captured() -> None:
    if torch.cuda.is_current_stream_capturing():
        refuse(ALLOCATOR)


class RefusedOnce(torch.cuda.CUDAGraph):
    """A graph of which one launch in a training step is refused, the ninth."""

    is_training = False
    num_replays = 0

    def replay(self) -> None:
        RefusedOnce.num_replays += RefusedOnce.is_training
        if RefusedOnce.is_training and RefusedOnce.num_replays == 9:
            refuse(RUNTIME)
        super().replay()


def take_all_memory(is_evicting: bool) -> None:
    """Leave nothing to torch's allocator; and if asked, nothing to anybody, moments included."""
    torch.cuda.synchronize()
    taken, size = [], 1 << 36
    while size >= 512:
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    HELD.append(taken)
    if is_evicting:
        from cuda.bindings import runtime  # pyright: ignore[reportMissingImports]

        size = 1 << 36
        while size >= 1 << 16:
            status, _ = runtime.cudaMalloc(size)
            if int(status) != 0:
                # the error is the next call's too, unless it is asked for
                runtime.cudaGetLastError()
                size //= 2


HELD: list[list[torch.Tensor]] = []


def let_memory_end(place: str, how: str) -> None:
    """Let memory end in one place of a run.

    Args:
        how: a message that is raised there; or "taken", "evicted": nothing is really left.
    """
    is_real = how in ("taken", "evicted")
    end = (
        functools.partial(take_all_memory, how == "evicted")
        if is_real
        else functools.partial(refuse, how)
    )
    owner, name, number = {
        # on a GPU two calls are the preflight's
        "launch": (MicroStep, "__call__", 6 + 2 * IS_GPU),
        "capture": (MicroStep, "_capture", 2),
        "loss": (MicroStep, "_loss", 6 + 2 * IS_GPU),
        "optimizer": (AdamW, "prefetch", 4),
        "evaluation": (MicroStep, "evaluate", 8),
        "sampling": (training.answers, "generate_greedy", 2),
        "save": (AdamW, "state_tensors", 1),
        "preflight": (MicroStep, "__call__", 1),
        "preflight's capture": (MicroStep, "_capture", 1),
    }[place]
    at_call(number, end, owner, name)


IS_GPU = torch.cuda.is_available()


def in_a_capture() -> None:
    at_every_call(refuse_while_captured, DecoderLayer, "backward")


def at_every_call(before: Callable[[], None], owner: Any, name: str) -> None:
    method = getattr(owner, name)

    def checked(*args: Any, **kwargs: Any) -> Any:
        before()
        return method(*args, **kwargs)

    setattr(owner, name, checked)


def in_a_replay() -> None:
    setattr(torch.cuda, "CUDAGraph", RefusedOnce)  # noqa: B010
    take = MicroStep.__call__

    # evaluations and answers are replayed too
    def counted(*args: Any, **kwargs: Any) -> Any:
        RefusedOnce.is_training = True
        try:
            return take(*args, **kwargs)
        finally:
            RefusedOnce.is_training = False

    setattr(MicroStep, "__call__", counted)  # noqa: B010


def take_second_ranks_memory(is_evicting: bool) -> None:
    """Before its second micro-batch; two calls are the preflight's."""
    if os.environ["RANK"] == "1":
        at_call(4, functools.partial(take_all_memory, is_evicting), MicroStep, "__call__")


def run_flags(folder: Path, device: str, *more: str) -> list[str]:
    given = f"--device {device} --deterministic --max-steps {NUM_STEPS} --save-steps 0"
    given += f" --eval-data {folder / 'data.jsonl'} --eval-steps 3 --sample-prompt Hello"
    given += " --sample-steps 3 --no-packing"
    return flags(folder, *given.split(), *more)


WholeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """Trains without a shortage, once for all tests of the same flags."""

    @functools.cache
    def run(device: str, *more: str) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        train.main(["--output", str(folder / "out"), *run_flags(folder, device, *more)])
        return folder / "out"

    return run


def assert_saved(
    tmp_path: Path, whole_run: WholeRun, before: Callable[[], None], device: str, *more: str
) -> None:
    """Train until memory ends, and go on: the same as without it."""
    config = run_flags(tmp_path, device, *more)
    output = tmp_path / "out"
    code, said = TrainProcess(output, *config, before=before).finish()
    assert code == 1, said
    assert "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: the GPU's memory must suffice for step "), said
    assert f"checkpoint-{last_step(output)} has the run as it stands; try --resume " in last
    train.main(["--output", str(output), *config, "--resume"])
    assert_equals(output, whole_run(device, *more))


@pytest.mark.skipif(IS_GPU, reason="counts the calls of a run on a CPU")
@pytest.mark.parametrize("how", [ALLOCATOR, RUNTIME], ids=["allocator", "runtime"])
@pytest.mark.parametrize("place", ["loss", "optimizer", "evaluation", "sampling"])
def test_where_memory_ends_the_run_is_saved(
    tmp_path: Path, whole_run: WholeRun, place: str, how: str
) -> None:
    assert_saved(tmp_path, whole_run, functools.partial(let_memory_end, place, how), "cpu")


def test_a_save_that_has_no_memory_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    config = run_flags(tmp_path, "cpu", "--save-steps", "2")
    output = tmp_path / "out"
    ends = functools.partial(save_never_again, 2)
    code, said = TrainProcess(output, *config, before=ends).finish()
    assert code == 1, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: the GPU's memory must suffice for step 5: CUDA out of memory")
    assert "and it could not be saved: CUDA out of memory" in last
    assert last.endswith("checkpoint-2 is the last checkpoint, for --resume")
    train.main(["--output", str(tmp_path / "whole"), *config])
    train.main(["--output", str(output), *config, "--resume"])
    assert_equals(output, tmp_path / "whole")


def save_never_again(number: int) -> None:
    for call in range(number, 50):
        at_call(call, functools.partial(refuse, ALLOCATOR), AdamW, "state_tensors")


@pytest.mark.parametrize("place", ["optimizer", "evaluation"])
def test_memory_that_ends_on_one_rank_is_known_to_all(tmp_path: Path, place: str) -> None:
    given = rank_flags(tmp_path, 2, f"--save-steps 0 --eval-data {tmp_path / 'data.jsonl'}")
    output = tmp_path / "out"
    numbers = {"optimizer": 2, "evaluation": 2}
    before = functools.partial(end_on_second_rank, place, numbers[place])
    ended = [rank.finish() for rank in train_ranks(output, [given] * 2, before)]
    assert [code for code, _ in ended] == [1, 1]
    assert "rank 1: out of memory; " in ended[0][1]
    assert f"checkpoint-{last_step(output)} has the run as it stands" in ended[0][1]
    assert "Traceback" not in ended[0][1] + ended[1][1]


def test_memory_that_ends_on_one_rank_before_step_1_is_known_to_all(tmp_path: Path) -> None:
    given = rank_flags(tmp_path, 2, "--save-steps 0")
    ranks = train_ranks(tmp_path / "out", [given] * 2, refuse_second_ranks_model)
    ended = [rank.finish() for rank in ranks]
    assert [code for code, _ in ended] == [1, 1]
    assert ended[0][1].strip().splitlines()[-1].startswith("error: the model and its longest micro")
    assert "must fit the GPU: rank 1: out of memory; lower --max-memory" in ended[0][1]
    assert "Traceback" not in ended[0][1] + ended[1][1]


def refuse_second_ranks_model() -> None:
    if os.environ["RANK"] == "1":
        at_call(1, functools.partial(refuse, ALLOCATOR), checkpoint.loading, "load_model")


def end_on_second_rank(place: str, number: int) -> None:
    if os.environ["RANK"] == "1":
        owner, name = {"optimizer": (AdamW, "prefetch"), "evaluation": (MicroStep, "evaluate")}[
            place
        ]
        at_call(number, functools.partial(refuse, RUNTIME), owner, name)


# it takes all memory of its GPU
@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["keep", "offload"])
@pytest.mark.parametrize(
    ("place", "how"),
    [
        ("launch", "taken"),
        ("launch", "evicted"),
        ("capture", RUNTIME),
        ("loss", ALLOCATOR),
        ("optimizer", "evicted"),
        ("evaluation", "taken"),
        ("sampling", "evicted"),
    ],
)
def test_gpu_where_memory_really_ends_the_run_is_saved(
    tmp_path: Path, whole_run: WholeRun, place: str, how: str, policy: str
) -> None:
    assert_saved(
        tmp_path,
        whole_run,
        functools.partial(let_memory_end, place, how),
        "cuda",
        "--activations",
        policy,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["keep", "recompute", "offload"])
@pytest.mark.parametrize("residency", ["device", "host"])
def test_gpu_a_replay_that_is_refused_costs_no_step(
    tmp_path: Path, whole_run: WholeRun, policy: str, residency: str
) -> None:
    more = ("--activations", policy, "--optimizer-residency", residency)
    assert_saved(tmp_path, whole_run, in_a_replay, "cuda", *more)


def test_a_kernel_that_does_not_fit_is_an_error_of_one_line(tmp_path: Path) -> None:
    given = run_flags(tmp_path, "cpu")
    code, said = TrainProcess(tmp_path / "out", *given, before=have_no_room_for_a_kernel).finish()
    assert code == 1
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1] == "error: _wide_kernel must fit the GPU"


def have_no_room_for_a_kernel() -> None:
    def refuse_kernel() -> None:
        raise KernelDoesNotFit("_wide_kernel must fit the GPU")

    at_call(1, refuse_kernel, MicroStep, "__call__")


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["keep", "offload"])
@pytest.mark.parametrize("before", ["preflight", "preflight's capture", "inside a capture"])
def test_gpu_memory_that_ends_before_step_1_is_an_error_of_one_line(
    tmp_path: Path, before: str, policy: str
) -> None:
    config = run_flags(tmp_path, "cuda", "--activations", policy)
    ends = (
        in_a_capture
        if before == "inside a capture"
        else functools.partial(let_memory_end, before, ALLOCATOR)
    )
    code, said = TrainProcess(tmp_path / "out", *config, before=ends).finish()
    assert code == 1, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: the model and its longest micro-batch, 1 x "), said
    assert "Tried to allocate 2.00 GiB; lower --max-memory, --batch-size or --max-length" in last
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_gpu_a_device_that_fails_leaves_the_last_checkpoint_and_one_line(tmp_path: Path) -> None:
    config = run_flags(tmp_path, "cuda", "--save-steps", "2")
    output = tmp_path / "out"
    code, said = TrainProcess(output, *config, before=fail_in_step_6).finish()
    assert code == 1, said
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: the GPU must go on working: it failed in step "), said
    assert last.endswith("checkpoint-4 is the last checkpoint, for --resume")
    train.main(["--output", str(tmp_path / "whole"), *config])
    train.main(["--output", str(output), *config, "--resume"])
    assert_equals(output, tmp_path / "whole")
    assert (output / ADAPTER).is_file()


def fail_in_step_6() -> None:
    at_call(8, read_nowhere, MicroStep, "__call__")


def read_nowhere() -> None:
    """Let a kernel fail: an index that no row has."""
    torch.zeros(4, device="cuda")[torch.tensor([1 << 40], device="cuda")]


# it takes all memory of a GPU and uses another
@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("how", ["taken", "evicted"])
def test_gpu_memory_that_really_ends_on_one_rank_saves_the_run(tmp_path: Path, how: str) -> None:
    given = rank_flags(tmp_path, 2, "--save-steps 0 --device cuda --deterministic")
    output = tmp_path / "out"
    before = functools.partial(take_second_ranks_memory, how == "evicted")
    ended = [rank.finish() for rank in train_ranks(output, [given] * 2, before)]
    assert [code for code, _ in ended] == [1, 1], ended
    assert "rank 1: out of memory; " in ended[0][1]
    assert f"checkpoint-{last_step(output)} has the run as it stands" in ended[0][1]
    assert "Traceback" not in ended[0][1] + ended[1][1]
