"""run/atomic.py, run/checkpoint.py, run/folder.py, run/lock.py, run/room.py, run/metrics.py."""

import errno
import fcntl
import hashlib
import json
import math
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from support.equality import assert_equal

from lora.adapter_file import WEIGHTS_NAME
from prepare.resuming import finished_lines
from run.atomic import clean, is_partial, make_folder, new_files, new_folder, write_text
from run.checkpoint import (
    BEST_FILE,
    MANIFEST_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    ResumePoint,
    RunState,
    list_checkpoints,
    load_checkpoint,
    load_newest_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from run.config import CONFIG_FILE, OLD_CONFIG_FILE, TrainConfig, find_config, to_json
from run.folder import (
    check_new_folder,
    check_output,
    check_writable,
    new_output,
    open_output,
    resume_point,
)
from run.lock import LOCK_FILE, check_unlocked, locked
from run.metrics import ANSWERS_FILE, METRICS_FILE, StepRows, describe, has_answer
from run.model_card import CARD_FILE
from run.room import checkpoint_bytes, num_checkpoints, reserved
from run.trackers import run_name

CONFIG = TrainConfig(model="m", data="d")
PARTIAL = ".quatrain.partial"


def begin_run(config: TrainConfig, resumed: ResumePoint | None = None, *damaged: Path) -> str:
    """Open an output folder as a run does, and end at once."""
    with open_output(config, resumed, damaged) as opened:
        return opened.output


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with new_folder(tmp_path / "a") as folder:
            (folder / "file").write_text("x")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_and_fail()
    assert names(tmp_path) == []
    with new_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "a").exists()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["file"]


def test_new_files_replace_old_ones_only_when_all_are_written(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "old").write_text("old")

    def write_and_fail() -> None:
        with new_files(tmp_path) as folder:
            (folder / "old").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_and_fail()
    assert (tmp_path / "old").read_text() == "old"
    with new_files(tmp_path) as folder:
        (folder / "old").write_text("new")
    assert names(tmp_path) == ["kept", "old"]
    assert (tmp_path / "old").read_text() == "new"


def test_new_files_go_into_folders_that_are_there_already(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with new_files(tmp_path) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / text).write_text(text)
            (folder / "inner" / "both").write_text(text)
    assert names(tmp_path) == ["inner"]
    assert names(tmp_path / "inner") == ["both", "new", "old"]
    assert (tmp_path / "inner" / "both").read_text() == "new"


def fsync_of_files_alone(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the disk refuse to flush folders."""
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr("run.atomic.os.fsync", refuse)


def test_a_disk_that_cannot_flush_folders_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync_of_files_alone(monkeypatch, errno.EINVAL)
    with new_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("x")
    assert names(tmp_path / "a") == ["file"]
    fsync_of_files_alone(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "b", "x")


def test_a_folder_is_on_the_disk_before_what_is_written_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr("run.atomic.os.fsync", noted)
    make_folder(tmp_path / "a" / "b" / "c")
    assert flushed == [str(tmp_path / inner) for inner in ("", "a", "a/b")]
    make_folder(tmp_path / "a" / "b" / "c")
    assert len(flushed) == 3


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "x")
    (tmp_path / "film.partial").write_text("somebody else's")
    (tmp_path / f"other{PARTIAL}").write_text("half")
    (tmp_path / f"checkpoint-5{PARTIAL}").mkdir()
    (tmp_path / f"checkpoint-5{PARTIAL}" / "state.json").write_text("{")
    assert load_newest_checkpoint(tmp_path) == (None, {})
    clean(tmp_path)
    assert names(tmp_path) == ["file", "film.partial"]


def test_a_folder_of_somebody_else_is_not_taken_for_a_half_written_one(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "thesis").write_text("the only copy")
    with new_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("x")
    write_text(tmp_path / "b", "x")
    assert (tmp_path / "a.partial" / "thesis").read_text() == "the only copy"


def save(folder: Path, step: int, best: dict[str, torch.Tensor] | None = None) -> Path:
    state = RunState(started="2026-01-01T00:00:00", step=step, tokens=10 * step, loss_scale=0.1)
    moments = {"exp_avg.a": torch.full((3,), float(step)), "exp_avg_sq.a": torch.ones(2, 2)}
    path = folder / f"checkpoint-{step}"
    save_checkpoint(path, state, moments, lambda f: write_text(f / "adapter", "a"), best)
    return path


def rewrite_state(path: Path, changes: dict[str, Any]) -> None:
    """Change a checkpoint's state, and its hash with it."""
    state = json.loads((path / STATE_FILE).read_text()) | changes
    (path / STATE_FILE).write_text(json.dumps(state))
    hashes = json.loads((path / MANIFEST_FILE).read_text())
    hashes[STATE_FILE] = hashlib.sha256((path / STATE_FILE).read_bytes()).hexdigest()
    (path / MANIFEST_FILE).write_text(json.dumps(hashes))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_the_newest_checkpoint_is_the_one_with_the_most_steps(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "checkpoint-999").write_text("a file")
    newest, damaged = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.path.name, damaged) == ("checkpoint-100", {})
    assert (newest.state.step, newest.state.tokens, newest.state.loss_scale) == (100, 1000, 0.1)
    assert_equal(newest.moments["exp_avg.a"], torch.full((3,), 100.0))
    assert newest.best == {}
    assert names(newest.path) == ["adapter", OPTIMIZER_FILE, MANIFEST_FILE, STATE_FILE]


def test_the_best_adapter_is_in_the_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 3, {"a": torch.tensor([1.0, -0.0])})
    assert_equal(load_checkpoint(path).best["a"], torch.tensor([1.0, -0.0]))
    flip_a_bit(path / BEST_FILE)
    with pytest.raises(ValueError, match=f"got {BEST_FILE} with another hash"):
        load_checkpoint(path)


@pytest.mark.parametrize("damage", [flip_a_bit, cut_in_half, Path.unlink])
@pytest.mark.parametrize("name", ["adapter", OPTIMIZER_FILE, STATE_FILE, MANIFEST_FILE])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    save(tmp_path, 2)
    path = save(tmp_path, 3)
    damage(path / name)
    with pytest.raises(ValueError, match=r"checkpoint-3 must be a whole checkpoint"):
        load_checkpoint(path)
    newest, damaged = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.path.name == "checkpoint-2"
    assert list(damaged) == [path]


def stale(path: Path, *args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ESTALE, "Stale file handle", str(path))


def deny(path: Path, *args: Any, **kwargs: Any) -> None:
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


@pytest.mark.parametrize("refuse", [stale, deny])
@pytest.mark.parametrize("method", ["open", "read_bytes"])
def test_a_file_that_cannot_be_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., None], method: str
) -> None:
    save(tmp_path, 2)
    path = save(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, refuse)
        with pytest.raises(OSError, match=r"checkpoint-3 must be readable: got .* left as it is"):
            load_newest_checkpoint(tmp_path)
    newest, damaged = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.path, damaged) == (path, {})


def test_a_state_of_another_version_is_no_damage(tmp_path: Path) -> None:
    save(tmp_path, 2)
    rewrite_state(save(tmp_path, 3), {"temperature": 1.0})
    with pytest.raises(ValueError, match=r"-3 must be a checkpoint of this version: .*temperature"):
        load_newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 10**9}, r"step must be that of the folder's name: got 1,000,000,000"),
        ({"step": "3"}, r"step must be an integer from 0 to .*: got '3'"),
        ({"step": True}, r"step must be an integer from 0 to .*: got True"),
        ({"tokens": -1}, r"tokens must be an integer from 0 to .*: got -1"),
        ({"num_updates": 10**400}, r"num_updates must be an integer"),
        ({"num_updates": 1 << 31}, r"num_updates must be an integer from 0 to 2,147,483,647: got"),
        ({"num_ranks": []}, r"num_ranks must be an integer"),
        ({"loss_scale": math.inf}, r"loss_scale must be a positive number: got inf"),
        ({"loss_scale": 0}, r"loss_scale must be a positive number: got 0"),
        ({"best_eval_loss": math.nan}, r"best_eval_loss must be a finite number or null: got nan"),
        ({"started": "yesterday"}, r"started must be a date and time: got 'yesterday'"),
        ({"started": 5}, r"started must be a date and time: got 5"),
        ({"base": {}}, r"base must be text: got \{\}"),
        ({"unevaluated": [1]}, r"unevaluated must be a row of metrics: got \[1\]"),
        ({"unevaluated": {"loss": "x"}}, r"unevaluated must be a row of metrics"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_state_that_no_run_comes_to_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    rewrite_state(save(tmp_path, 3), changes)
    with pytest.raises(ValueError, match=rf"checkpoint-3/state.json: {message}"):
        load_newest_checkpoint(tmp_path)


def test_a_state_has_figures_that_are_not_finite_in_a_row_that_waits(tmp_path: Path) -> None:
    row = {"loss": math.nan, "grad_norm": math.inf, "eval_loss": None, "tokens": 7}
    rewrite_state(save(tmp_path, 3), {"unevaluated": row})
    newest, _ = load_newest_checkpoint(tmp_path)
    assert newest is not None
    assert repr(newest.state.unevaluated) == repr(row)


def test_a_damaged_checkpoint_is_set_aside_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(CONFIG, output=str(tmp_path), resume="auto")
    begin_run(config)
    for number in ("", "-2"):
        path = save(tmp_path, 3)
        flip_a_bit(path / OPTIMIZER_FILE)
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        begin_run(config, None, path)
        aside = tmp_path / f"checkpoint-3.damaged{number}"
        assert {file.name: file.read_bytes() for file in aside.iterdir()} == before
        assert f"{path} is set aside as {aside.name}\n" in capsys.readouterr().out
        assert list_checkpoints(tmp_path) == []


def test_a_run_killed_between_a_save_and_the_removal_keeps_no_more_than_asked_for(
    tmp_path: Path,
) -> None:
    config = replace(CONFIG, output=str(tmp_path), resume="auto", save_total_limit=2)
    begin_run(config)
    for step in (1, 2, 3):
        save(tmp_path, step)
    begin_run(config, load_checkpoint(tmp_path / "checkpoint-3"))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_with_nothing_but_damaged_checkpoints_no_run_begins_anew(tmp_path: Path) -> None:
    for step in (2, 3):
        flip_a_bit(save(tmp_path, step) / STATE_FILE)
    with pytest.raises(ValueError, match=r"must be whole: .*-3 .*-2 must be .*; move them"):
        load_newest_checkpoint(tmp_path)


def test_old_checkpoints_go_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (9, 100, 20, 30):
        save(tmp_path, step)
    remove_old_checkpoints(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-30", "checkpoint-100"]

    def killed(path: Path) -> None:
        (path / STATE_FILE).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("run.atomic.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_old_checkpoints(tmp_path, 1)
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-100"]
    clean(tmp_path)
    assert names(tmp_path) == ["checkpoint-100"]


def test_an_output_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    config = replace(CONFIG, output=str(tmp_path / "out"))
    check_output(config)
    begin_run(config)
    with pytest.raises(ValueError, match=r"new or empty folder: .*out holds run\.json"):
        check_output(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--output must be a folder: got the file"):
        check_output(replace(CONFIG, output=str(tmp_path / "file")))


def test_somebody_elses_half_written_file_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "film.partial").write_text("half")
    with pytest.raises(ValueError, match=r"new or empty folder: .* holds film\.partial"):
        check_output(replace(CONFIG, output=str(tmp_path)))


def test_a_resumed_run_keeps_its_flags(tmp_path: Path) -> None:
    config = replace(CONFIG, output=str(tmp_path / "out"), resume="auto")
    # a folder that is not there yet: nothing to resume, which is no error
    check_output(config)
    assert resume_point(config) == (None, {})
    begin_run(config)
    check_output(config)
    with pytest.raises(ValueError, match=r"--lora-r was 16, now 8"):
        check_output(replace(config, lora_r=8))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(ValueError, match=r"the folder of a run: .*photos has no run\.json"):
        check_output(replace(config, output=str(tmp_path / "photos")))


def test_a_folder_of_an_earlier_version_goes_on_under_the_new_name(tmp_path: Path) -> None:
    config = replace(CONFIG, output=str(tmp_path), resume="auto")
    (tmp_path / OLD_CONFIG_FILE).write_text(to_json(replace(config, save_steps=7)))
    with pytest.raises(ValueError, match=r"--lora-r was 16, now 8"):
        check_output(replace(config, lora_r=8))
    with pytest.raises(ValueError, match=r"new or empty folder: .* holds config\.json"):
        check_output(replace(config, resume=""))
    check_output(config)
    assert names(tmp_path) == [OLD_CONFIG_FILE]
    begin_run(config)
    assert names(tmp_path) == [CONFIG_FILE]
    assert (tmp_path / CONFIG_FILE).read_text() == to_json(config)


def test_a_resumed_run_keeps_what_its_first_start_asked_for(tmp_path: Path) -> None:
    config = replace(CONFIG, output=str(tmp_path / "out"), device="cpu")
    path = tmp_path / "out" / CONFIG_FILE
    with open_output(config, asked={"device": "auto"}):
        assert path.read_text() == to_json(config, {"device": "auto"})
    # its own file names the device
    resumed = replace(config, resume="auto", save_steps=7)
    with open_output(resumed, asked={}):
        assert path.read_text() == to_json(resumed, {"device": "auto"})


def test_the_card_is_the_mark_of_a_finished_run(tmp_path: Path) -> None:
    config = replace(CONFIG, output=str(tmp_path), resume="auto")
    (tmp_path / CONFIG_FILE).write_text(to_json(config))
    (tmp_path / METRICS_FILE).write_text('{"step": 3, "loss": 1.0}\n{"step": 4, "los')
    (tmp_path / WEIGHTS_NAME).touch()
    assert finished_lines(config) == []
    with pytest.raises(ValueError, match=r"start a new run in another --output$"):
        check_output(replace(config, max_steps=9))
    (tmp_path / CARD_FILE).touch()
    since, further = finished_lines(config)
    assert since == f"{tmp_path} is finished since step 3, its adapter is there: nothing to resume"
    assert further == f"to train it further, start a new run with --init-adapter {tmp_path}"
    with pytest.raises(ValueError, match=rf"another --output, with --init-adapter {tmp_path}$"):
        check_output(replace(config, max_steps=9))
    (tmp_path / METRICS_FILE).unlink()
    assert finished_lines(config)[0].startswith(f"{tmp_path} is finished, its adapter")
    # whoever moved the adapter away gets it again
    (tmp_path / WEIGHTS_NAME).unlink()
    assert finished_lines(config) == []


@pytest.mark.parametrize("last", ["flush", "write_text"])
def test_an_old_folders_settings_are_there_once_wherever_a_kill_falls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    config = replace(CONFIG, output=str(tmp_path), resume="auto")
    (tmp_path / OLD_CONFIG_FILE).write_text(to_json(config))

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"run.folder.{last}", killed)
    with pytest.raises(KeyboardInterrupt):
        begin_run(config)
    monkeypatch.undo()
    found = find_config(tmp_path)
    assert found is not None
    assert found.read_text() == to_json(config)
    assert names(tmp_path) == [found.name]
    begin_run(config)
    assert names(tmp_path) == [CONFIG_FILE]


def test_a_models_config_is_not_taken_for_a_runs(tmp_path: Path) -> None:
    config = replace(CONFIG, output=str(tmp_path), resume="auto")
    text = '{"architectures": ["LlamaForCausalLM"], "lora": null}'
    (tmp_path / OLD_CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"the folder of a run: .* has no run\.json"):
        check_output(config)
    # beside a run's own settings it stays as it is
    (tmp_path / CONFIG_FILE).write_text(to_json(config))
    begin_run(config)
    assert (tmp_path / OLD_CONFIG_FILE).read_text() == text
    assert names(tmp_path) == [OLD_CONFIG_FILE, CONFIG_FILE]


def test_a_damaged_old_config_is_named(tmp_path: Path) -> None:
    (tmp_path / OLD_CONFIG_FILE).write_text(to_json(CONFIG)[:-3])
    with pytest.raises(ValueError, match=r"config\.json must be JSON"):
        check_output(replace(CONFIG, output=str(tmp_path), resume="auto"))


def test_without_output_the_next_free_folder_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # two runs that begin at once
    with open_output(CONFIG) as first, open_output(CONFIG) as second:
        assert [first.output, second.output] == ["out/run-1", "out/run-2"]
    assert begin_run(CONFIG) == "out/run-3"
    assert json.loads((tmp_path / "out/run-3/run.json").read_text())["output"] == "out/run-3"
    assert begin_run(replace(CONFIG, output="x")) == "x"


def test_one_process_writes_a_folder_at_a_time(tmp_path: Path) -> None:
    config = replace(CONFIG, output=str(tmp_path / "out"))
    resumed = replace(config, resume="auto")
    with open_output(config):
        for late in (config, resumed):
            for door in (check_output, begin_run):
                with pytest.raises(ValueError, match="by one process at a time: another one is"):
                    door(late)
    # its lock ends with it
    assert names(tmp_path / "out") == ["run.json"]
    check_output(resumed)
    begin_run(resumed)


def test_the_lock_of_a_killed_process_stops_nobody(tmp_path: Path) -> None:
    code = "import os, sys, time\nfrom pathlib import Path\nfrom run.lock import locked\n"
    code += "with locked(Path(sys.argv[1]), 'it'):\n    print('held', flush=True)\n"
    code += "    time.sleep(600)"
    lock = tmp_path / LOCK_FILE
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another one is writing it"):
            check_unlocked(lock, "it")
        process.kill()
    assert lock.is_file()
    check_unlocked(lock, "it")
    check_output(replace(CONFIG, output=str(tmp_path)))
    begin_run(replace(CONFIG, output=str(tmp_path)))


def test_a_lock_that_was_removed_while_it_was_waited_for_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock = tmp_path / LOCK_FILE, fcntl.flock

    def removed(descriptor: int, kind: int) -> None:
        monkeypatch.undo()
        # whoever held it ends between the two calls
        path.unlink()
        flock(descriptor, kind)

    monkeypatch.setattr("run.lock.fcntl.flock", removed)
    with locked(path, "it"), pytest.raises(ValueError, match="another one is writing it"):
        check_unlocked(path, "it")


def test_a_disk_without_locks_is_used_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("run.lock.fcntl.flock", unknown)
    begin_run(replace(CONFIG, output=str(tmp_path / "out")))
    assert "has no locks (Function not implemented): let no second" in capsys.readouterr().out


def test_a_checkpoint_that_another_process_wrote_meanwhile_is_not_gone_back_over(
    tmp_path: Path,
) -> None:
    config = replace(CONFIG, output=str(tmp_path), resume="auto")
    begin_run(config)
    save(tmp_path, 1)
    resumed, _ = resume_point(config)
    save(tmp_path, 2)
    with pytest.raises(ValueError, match="must stay as it is while a run begins"):
        begin_run(config, resumed)


def test_an_output_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"must be in a folder: got .*out, and .*file is a file"):
        check_writable(tmp_path / "file" / "out")
    assert names(tmp_path) == ["file"]
    with pytest.raises(ValueError, match="--output must be writable: /proc: "):
        check_writable(Path("/proc/out"))


def test_a_link_is_followed_wherever_it_leads(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    begin_run(replace(CONFIG, output=str(tmp_path / "run")))
    assert names(tmp_path / "disk" / "run") == ["run.json"]
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    # nothing there, and an empty folder
    for _ in range(2):
        check_new_folder(tmp_path / "model", 0)
        with new_output(tmp_path / "model") as folder:
            (folder / "file").write_text("x")
        assert names(tmp_path / "disk") == ["model", "run"]
        assert names(tmp_path / "model") == ["file"]
        (tmp_path / "model" / "file").unlink()


def test_the_folder_that_one_is_in_can_be_a_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, output=".")
    check_output(config)
    check_writable(Path(config.output))
    begin_run(config)
    assert names(tmp_path) == ["run.json"]
    assert run_name(config, RunState("2026-01-01T00:00:00")) == (
        f"{tmp_path.name}-2026-01-01T000000"
    )


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="than the one you are in; give a folder inside it"):
        check_new_folder(Path(), 0)
    (tmp_path / "mount").mkdir(mode=0o700)
    check_new_folder(tmp_path / "mount", 0)
    assert (tmp_path / "mount").stat().st_mode & 0o7777 == 0o700

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rmdir", busy)
    with pytest.raises(ValueError, match=r"replaced: .*mount: Device or resource busy; give"):
        check_new_folder(tmp_path / "mount", 0)


def test_two_processes_do_not_write_one_new_folder(tmp_path: Path) -> None:
    with new_output(tmp_path / "model") as first:
        (first / "file").write_text("x")
        with (
            pytest.raises(ValueError, match="by one process at a time: another one is writing it"),
            new_output(tmp_path / "model"),
        ):
            pytest.fail("the second one began")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["file"]


def test_metrics_past_the_checkpoint_and_a_cut_line_are_dropped(tmp_path: Path) -> None:
    metrics = StepRows(tmp_path / METRICS_FILE, 0)
    for step in (1, 2, 3):
        metrics.append({"step": step, "loss": 1.0 / step})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    resumed = StepRows(tmp_path / METRICS_FILE, 2)
    assert resumed.rows[-1] == {"step": 2, "loss": 0.5}
    resumed.append({"step": 3, "loss": float("nan")})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": None},
    ]


DAMAGED_ROWS = (
    b"",
    b"{",
    b'{"loss": 1.0}',
    b'{"step": "2", "loss": 1.0}',
    b'{"step": 2, "loss": "low"}',
    b'{"step": 2, "loss": 1.0, "loss": 2.0}',
    b'{"step": 2, "a": ' + b"[" * 5000 + b"}",
    b"[2]",
    b"\xff\x00\x00",
)


@pytest.mark.parametrize("damaged", DAMAGED_ROWS, ids=range(len(DAMAGED_ROWS)))
def test_a_damaged_row_costs_no_other_and_the_file_is_kept(
    damaged: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / METRICS_FILE
    content = b'{"step": 1, "loss": 1.0}\n' + damaged + b'\n{"step": 3, "loss": 0.5}\n'
    path.write_bytes(content)
    (tmp_path / "metrics.jsonl.damaged-1").write_text("of another time")
    rows = StepRows(path, 3).rows
    assert [row["step"] for row in rows] == [1, 3]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert (tmp_path / "metrics.jsonl.damaged-2").read_bytes() == content
    said = capsys.readouterr().out
    assert f"{path}:2 is not a row that a run has written: {path}.damaged-2 is a copy" in said


def test_an_answer_without_its_prompt_is_a_damaged_row(tmp_path: Path) -> None:
    path = tmp_path / ANSWERS_FILE
    good = {"step": 0, "prompt": "who", "answer": "me"}
    lines = [{**good, "answer": 5}, {"step": 0, "answer": "me"}, good]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert StepRows(path, 0, has_answer).rows == [good]


def test_metrics_survive_where_dropping_rows_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = StepRows(tmp_path / METRICS_FILE, 0)
    for step in (1, 2):
        metrics.append({"step": step, "loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_text()

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("run.atomic.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        StepRows(tmp_path / METRICS_FILE, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_line_of_the_log_has_speed_and_memory() -> None:
    row = {
        "step": 3,
        "loss": 1.25,
        "grad_norm": 0.5,
        "learning_rate": 1e-4,
        "tokens_per_second": 12345.6,
        "peak_memory_bytes": 3 << 29,
    }
    with_aux = describe(row | {"aux_loss": 2.5})
    assert with_aux == describe(row).replace("loss 1.2500", "loss 1.2500  aux_loss 2.5000")
    assert describe(row) == "loss 1.2500  grad_norm 0.500  lr 1.00e-04  12,346 tok/s  1.50 GiB"
    assert (
        describe({"eval_loss": 2.0, "peak_memory_bytes": 1 << 30}) == "eval_loss 2.0000  1.00 GiB"
    )


@pytest.mark.parametrize(
    ("save_steps", "limit", "step", "expected"),
    [
        # steps 10, 20 and 30: the last step's is the adapter itself
        (10, 0, 0, 3),
        (10, 0, 10, 2),
        (10, 0, 9, 3),
        # one too many while the oldest goes
        (10, 1, 0, 2),
        (10, 5, 0, 3),
        # where it is stopped
        (0, 0, 0, 1),
        (100, 1, 0, 1),
    ],
)
def test_the_checkpoints_of_a_run_are_counted_before_it(
    save_steps: int, limit: int, step: int, expected: int
) -> None:
    assert num_checkpoints(save_steps, limit, step, num_steps=40) == expected


def test_a_checkpoint_is_as_large_as_is_reckoned(tmp_path: Path) -> None:
    numbers = torch.zeros(10_000)
    moments = {"exp_avg": numbers.clone(), "exp_avg_sq": numbers.clone()}

    def write_adapter(folder: Path) -> None:
        save_file({"a": numbers}, folder / "adapter")

    for patience, best in ((0, {}), (1, {"a": numbers})):
        path = tmp_path / f"checkpoint-{patience}"
        save_checkpoint(path, RunState("now"), moments, write_adapter, best)
        saved = sum(file.stat().st_size for file in path.glob("*") if file.suffix != ".json")
        config = replace(CONFIG, early_stopping_patience=patience, eval_steps=1, eval_data="e")
        reckoned = checkpoint_bytes(config, len(numbers), moment_bytes=8)
        # but for names and shapes
        assert reckoned <= saved <= reckoned + 600


def test_reserved_room_is_taken_and_given_back(tmp_path: Path) -> None:
    with reserved(tmp_path, 1 << 20) as give_back:
        (path,) = tmp_path.iterdir()
        assert path.stat().st_blocks * 512 >= 1 << 20
        # what a killed process leaves goes with the next one
        assert is_partial(path)
        give_back()
        assert names(tmp_path) == []
    with reserved(tmp_path, 1 << 20):
        pass
    assert names(tmp_path) == []
