"""train.py on a mixture of experts: its auxiliary loss, and updates of its experts."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.tiny_mixture import mixture_model
from test_train_ranks import assert_close, flags, rows_of, run_ranks

import train
from prepare.asked import ask
from prepare.first_lines import first_lines
from prepare.job import BUNDLED
from run.ranks import Ranks

# the tiny OLMoE's
NUM_EXPERTS, NUM_CHOSEN = 5, 3


def test_two_ranks_have_the_auxiliary_loss_of_one_process(tmp_path: Path) -> None:
    more = f"--model {mixture_model(tmp_path / 'model')} --router-aux-loss-coef 0.5 --max-steps 2"
    train.main(["--output", str(tmp_path / "one"), *flags(tmp_path, 8, more)])
    run_ranks(tmp_path / "two", flags(tmp_path, 4, more))
    assert_close(tmp_path / "two", tmp_path / "one")
    for row in rows_of(tmp_path / "one")[1:]:
        # the mean of all micro-batches, whatever its weight
        assert NUM_CHOSEN <= row["aux_loss"] <= NUM_EXPERTS


def test_the_weight_of_the_auxiliary_loss_is_no_matter_of_accumulation(tmp_path: Path) -> None:
    data, model = tmp_path / "data.jsonl", mixture_model(tmp_path / "model")
    line = (BUNDLED / "data.jsonl").read_text().splitlines()[0]
    rows = []
    for count in (1, 3):
        data.write_text(f"{line}\n" * count)
        output = tmp_path / f"out-{count}"
        given = f"--model {model} --data {data} --output {output} --batch-size 1 --max-steps 1 "
        given += f"--gradient-accumulation-steps {count} --router-aux-loss-coef 10 --device cpu"
        train.main(given.split())
        rows.append(rows_of(output)[0])
    one, three = rows
    # a step of three equal samples is a step of one of them
    for name in ("loss", "aux_loss", "grad_norm"):
        assert three[name] == pytest.approx(one[name], rel=300 * 2**-24), name


def test_a_dense_model_has_no_auxiliary_loss() -> None:
    given = f"--model {BUNDLED / 'model'} --data d.jsonl --router-aux-loss-coef 0.01"
    with pytest.raises(ValueError, match=r"no layer of .* has experts, got 0.01"):
        ask(given.split(), {}, Ranks())


@pytest.mark.parametrize(("flag", "is_said"), [("", True), ("--router-aux-loss-coef 0.1", False)])
def test_a_line_says_that_config_json_asks_in_vain(
    tmp_path: Path, flag: str, is_said: bool
) -> None:
    model = mixture_model(tmp_path, output_router_logits=True)
    asked = ask(f"--model {model} --data d.jsonl --device cpu {flag}".split(), {}, Ranks())
    said = "\n".join(first_lines(asked.config, asked.lora, asked.checkpoint))
    assert ("--router-aux-loss-coef adds it" in said) == is_said


def test_experts_learn_and_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    model, output = mixture_model(tmp_path / "model"), tmp_path / "out"
    given = f"--model {model} --data {BUNDLED / 'eval.jsonl'} --output {output} --max-steps 3 "
    given += "--batch-size 2 --gradient-accumulation-steps 1 --save-steps 2 --device cpu --lora-r 2"
    given += " --target-parameters gate_up_proj,down_proj --activations recompute"
    train.main(given.split())
    adapter = output / "adapter_model.safetensors"
    expected, learned = adapter.read_bytes(), load_file(adapter)
    of_experts = [name for name in learned if ".mlp.experts." in name]
    # A and B of both tensors, of two layers
    assert len(of_experts) == 8
    assert all(learned[name].any() for name in of_experts)
    adapter.unlink()
    train.main([*given.split(), "--resume"])
    assert adapter.read_bytes() == expected
