"""prepare/asked.py: what the command line left to the machine, beside what it became."""

from pathlib import Path

import pytest
import torch
from support.tiny_llama import FIELDS, VARIANTS, random_tensors, write_checkpoint
from test_run_machine import install_gpu

from prepare.asked import ask
from prepare.job import BUNDLED
from run.ranks import Ranks

RUN = ["--model", str(BUNDLED / "model"), "--data", "d.jsonl"]


@pytest.mark.parametrize(
    ("flags", "undecided"),
    [
        ("", {"device": "auto", "dtype": "auto", "max_length": 0, "packing": None}),
        ("--dtype float32 --max-length 64 --no-packing", {"device": "auto"}),
        ("--device cpu --dtype float32 --max-length 64 --packing", {}),
    ],
    ids=["all", "some", "none"],
)
def test_what_is_left_to_the_machine_is_kept_as_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, flags: str, undecided: dict[str, object]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = ask([*RUN, *flags.split()], {}, Ranks())
    assert asked.undecided == undecided
    assert (asked.config.device, asked.config.dtype) == ("cpu", "float32")
    assert asked.config.max_length in (64, 256)


def write_wide(folder: Path, variant: str, **fields: object) -> list[str]:
    """Write a tiny checkpoint with other fields; the flags of a run with it."""
    fields = FIELDS | VARIANTS[variant] | fields
    write_checkpoint(folder, fields, random_tensors(fields, torch.bfloat16))
    return ["--model", str(folder), "--data", "d.jsonl"]


@pytest.mark.parametrize("is_here", [True, False], ids=["here", "planned"])
@pytest.mark.parametrize(
    ("variant", "fields", "flags", "came"),
    [
        (
            "grouped-query",
            {"head_dim": 1024},
            "",
            "512 numbers wide in bfloat16 on this GPU: got 1,024",
        ),
        (
            "grouped-query",
            {"head_dim": 512},
            "--dtype float32",
            "256 .* in float32 on this GPU: got 512",
        ),
        # of some layers alone
        ("gemma4", {"global_head_dim": 514}, "", "512 numbers wide in bfloat16 .*: got 514"),
    ],
    ids=["wide", "32 bits", "own heads"],
)
def test_heads_that_a_gpu_has_no_room_for_are_refused_before_data_are_looked_at(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_here: bool,
    variant: str,
    fields: dict[str, object],
    flags: str,
    came: str,
) -> None:
    run = [*write_wide(tmp_path, variant, **fields), *flags.split()]
    if is_here:
        install_gpu(monkeypatch, (8, 0))
        monkeypatch.setattr("prepare.asked.configure_torch", lambda *_: None)
    else:
        run += ["--plan", "--gpu", "a100-80"]
    with pytest.raises(ValueError, match=f"^the heads of attention must be .*{came}; ") as refusal:
        ask(run, {}, Ranks())
    assert "\n" not in str(refusal.value)
    if not is_here:
        run = run[:-2]
    ask([*run, "--device", "cpu"], {}, Ranks())
