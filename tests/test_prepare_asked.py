"""prepare/asked.py: what the command line left to the machine, beside what it became."""

import pytest
import torch

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
