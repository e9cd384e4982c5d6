"""run/config.py: the command line, the config file, and what a resumed run may change."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from run.config import (
    TrainConfig,
    build_parser,
    differences,
    make_config,
    read_asked,
    read_fields,
    read_given,
    to_json,
)

BUNDLED: dict[str, Any] = {"model": "bundled", "data": "bundled.jsonl", "learning_rate": 1e-2}


def parse(line: str) -> TrainConfig:
    return make_config(read_given(line.split()), BUNDLED)


def test_without_arguments_the_bundled_run_is_meant() -> None:
    config = parse("")
    assert (config.model, config.data, config.learning_rate) == ("bundled", "bundled.jsonl", 1e-2)


def test_flags_override_the_bundled_run() -> None:
    assert parse("--learning-rate 3e-4").learning_rate == 3e-4


def test_a_named_model_has_nothing_of_the_bundled_run() -> None:
    config = parse("--model m --data d")
    assert config == TrainConfig(model="m", data="d")


def test_a_plan_needs_no_data() -> None:
    assert parse("--model m --plan") == TrainConfig(model="m", plan=True)
    assert parse("--plan").data == "bundled.jsonl"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("--model m", "--model and --data must be given together: got --model without --data"),
        ("--data d", "got --data without --model"),
        ("--data d --plan", "got --data without --model"),
        ("--model m --data d --gpu 4090", "--gpu must be given with --plan: got 4090"),
        ("--model m --plan --eval-data e", "--eval-data must be given with --data: got none"),
        ("--model m --plan --inspect 1", "--inspect must be given with --data: got none"),
        ("--resume", "--resume must be given with --output"),
        ("--batch-size 0", "--batch-size must be at least 1: got 0"),
        ("--learning-rate 0", "--learning-rate must be positive: got 0.0"),
        ("--learning-rate nan", "--learning-rate must be positive: got nan"),
        ("--learning-rate inf", "--learning-rate must be finite: got inf"),
        ("--weight-decay -1", "--weight-decay must be at least 0"),
        ("--warmup-ratio 2", r"--warmup-ratio must be in \[0, 1\]"),
        ("--max-length 1", "--max-length must be at least 2, or 0"),
        ("--max-steps -5", "--max-steps must be at least 0"),
        ("--epochs 0", "--epochs must be positive"),
        (f"--max-steps {10**400}", r"--max-steps must be less than 2\^63: got 1000"),
        (f"--lora-r {1 << 63}", r"--lora-r must be less than 2\^63: got 92233720"),
        (
            "--seed 18446744073709551616",
            r"--seed must be in \[-2\^63, 2\^64\): got 1844674407370955",
        ),
        (
            "--seed -9223372036854775809",
            r"--seed must be in \[-2\^63, 2\^64\): got -922337203685477",
        ),
    ],
)
def test_values_out_of_range_are_refused(line: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse(line)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**64 - 1])
def test_a_seed_that_is_taken_draws_an_adapter(seed: int) -> None:
    assert parse(f"--seed {seed}").seed == seed
    torch.Generator().manual_seed(seed)


def test_every_flag_that_is_a_path_knows_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("model", "data", "output", "eval_data", "chat_template", "init_adapter")
    config = parse(" ".join(f"--{name.replace('_', '-')}=~/{name}" for name in names))
    assert [getattr(config, name) for name in names] == [str(tmp_path / name) for name in names]
    # and a file that a person wrote
    fields = {name: f"~/{name}" for name in names}
    (tmp_path / "run.json").write_text(json.dumps(fields))
    assert parse("--config=~/run.json") == config
    (tmp_path / "run.json").write_text(json.dumps(asdict(config) | fields))
    assert differences(config, tmp_path / "run.json") == []


def test_data_given_again_is_one_more_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse("--model m --data=~/a.jsonl=0.5 --data owner/name --data b,~/c")
    assert config.data == f"{tmp_path}/a.jsonl=0.5,owner/name,b,{tmp_path}/c"
    (tmp_path / "run.json").write_text(to_json(config))
    assert parse(f"--config {tmp_path}/run.json") == config
    assert parse(f"--config {tmp_path}/run.json --data d --data e").data == "d,e"
    # the last value of any other flag
    assert parse("--model m --model n --data d").model == "n"
    assert parse("--target-modules q_proj --target-modules v_proj").target_modules == "v_proj"
    with pytest.raises(ValueError, match="must name each data set once: got d twice"):
        parse("--model m --data d --data d=2")


@pytest.mark.parametrize("line", ["--quant int8", "--learning-rte 1", "--model", "--dtype fp8"])
def test_unknown_flags_and_choices_end_with_a_line(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(line)
    assert stop.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("error: ")
    assert message.endswith("; train.py --help lists all flags")


def test_every_field_is_a_flag_and_the_reverse() -> None:
    flags = {name for action in build_parser()._actions for name in action.option_strings}
    expected = {"--" + f.name.replace("_", "-") for f in fields(TrainConfig)}
    assert {f for f in flags if not f.startswith("--no-")} - {
        "-h",
        "--help",
        "--config",
    } == expected


def test_a_config_file_runs_again_and_flags_override_it(tmp_path: Path) -> None:
    config = parse("--model m --data d --learning-rate 3e-5 --no-shuffle --epochs 2")
    path = tmp_path / "run.json"
    path.write_text(to_json(config))
    assert parse(f"--config {path}") == config
    assert parse(f"--config {path} --epochs 3").epochs == 3.0
    assert json.loads(path.read_text()) == asdict(config)


def test_a_config_file_asks_for_what_was_asked_and_a_resumed_run_for_what_it_became(
    tmp_path: Path,
) -> None:
    became = parse("--model m --data d --device cpu --dtype float32 --max-length 256 --lora-r 8")
    asked = {"device": "auto", "dtype": "auto", "max_length": 0, "packing": None}
    path = tmp_path / "run.json"
    path.write_text(to_json(became, asked))
    assert json.loads(path.read_text()) == asdict(became) | {"asked": asked}
    assert parse(f"--config {path}") == replace(became, **asked)
    # what is given on the command line comes first
    assert parse(f"--config {path} --device cpu").device == "cpu"
    found = parse(f"--resume {tmp_path}")
    assert found == replace(became, output=str(tmp_path), resume="auto")
    # so compares another start with the run
    assert differences(became, path) == []
    assert differences(replace(became, device="cuda"), path) == ["--device was 'cpu', now 'cuda'"]
    assert read_asked(path) == asked


def test_a_run_is_gone_on_with_by_its_folder(tmp_path: Path) -> None:
    config = parse(f"--model m --data d --learning-rate 3e-5 --epochs 2 --output {tmp_path}/gone")
    (tmp_path / "run.json").write_text(to_json(config))
    # wherever the folder is by now
    found = parse(f"--resume {tmp_path} --save-steps 7")
    moved = {"output": str(tmp_path), "resume": "auto", "save_steps": 7}
    assert asdict(found) == asdict(config) | moved
    with pytest.raises(ValueError, match=r"--resume .* says which run it is: leave out --output"):
        parse(f"--resume {tmp_path} --output x")
    with pytest.raises(ValueError, match="leave out --config"):
        parse(f"--resume {tmp_path} --config x")
    with pytest.raises(FileNotFoundError, match=r"must name the folder of a run: .*none has no"):
        parse(f"--resume {tmp_path}/none")
    # a file of settings has no folder's name in it
    (tmp_path / "run.json").write_text('{"resume": "out/last"}')
    with pytest.raises(ValueError, match="--resume must be auto, or be left bare: got out/last"):
        parse(f"--config {tmp_path}/run.json --output a")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "must be JSON"),
        ("[]", "must hold a JSON object: got a list"),
        ('{"lerning_rate": 1}', "lerning_rate is unknown: did you mean --learning-rate"),
        ('{"epochs": "three"}', "epochs: must be a number: got 'three'"),
        ('{"batch_size": true}', "batch-size: must be a whole number: got 'true' "),
        ('{"batch_size": 2.5}', "batch-size: must be a whole number: got '2.5'"),
        ('{"asked": ["auto"]}', "asked is unknown"),
        ('{"asked": {"epochs": "three"}}', "epochs: must be a number: got 'three'"),
    ],
)
def test_a_bad_config_file_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=complaint):
        read_fields(path)


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--config must be .* no file .*run\.json"):
        parse(f"--config {tmp_path / 'run.json'}")


def test_a_flag_younger_than_the_file_had_its_default(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model": "m", "data": "d"}))
    assert differences(parse("--model m --data d"), path) == []
    changed = differences(parse("--model m --data d --adam-beta2 0.95"), path)
    assert changed == ["--adam-beta2 was 0.999, now 0.95"]


def test_only_flags_that_decide_the_result_count_as_differences(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(to_json(parse("--output a --save-steps 5")))
    assert differences(parse("--output b --resume --save-steps 7 --logging-steps 2"), path) == []
    assert differences(parse("--seed 1 --epochs 2"), path) == [
        "--epochs was 1.0, now 2.0",
        "--seed was 42, now 1",
    ]


@pytest.mark.parametrize(
    ("line", "resume"),
    [
        ("", ""),
        ("--resume --output a", "auto"),
        ("--output a --resume", "auto"),
        ("--output a --resume auto", "auto"),
        ("--output a --resume --no-resume", ""),
    ],
)
def test_resume_may_be_bare(line: str, resume: str) -> None:
    assert parse(line).resume == resume


def test_a_checkpoint_is_answered_with_its_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(to_json(parse("--model m --data d")))
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(FileNotFoundError, match=f"in that of a run: --resume {tmp_path}$"):
        parse(f"--resume {tmp_path}/checkpoint-2")
    with pytest.raises(FileNotFoundError, match=r"has no run\.json$"):
        parse(f"--resume {tmp_path}/checkpoint-2/more")


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--data a.jsonl b.jsonl --data c.jsonl=2", "data", "a.jsonl,b.jsonl,c.jsonl=2"),
        ("--lora_target_modules q_proj v_proj", "target_modules", "q_proj,v_proj"),
        ("--report_to wandb tensorboard", "report_to", "wandb,tensorboard"),
    ],
)
def test_texts_of_a_list_may_be_apart(line: str, name: str, value: str) -> None:
    assert read_given(line.split()) == {name: value}


def test_a_value_of_a_wrong_kind_is_answered_with_what_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # a share, as transformers takes it
    with pytest.raises(SystemExit):
        read_given(["--warmup_steps", "0.03"])
    assert (
        "--warmup-steps: must be a whole number: got '0.03' (steps in which it rises, instead of "
        "--warmup-ratio)" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("name", "fields"), [("text", ""), ("body", "text=body")])
def test_the_field_of_a_text_may_be_alone_in_a_file(tmp_path: Path, name: str, fields: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"text_field": name}))
    assert read_fields(path).get("fields", "") == fields


@pytest.mark.parametrize(("switch", "resume"), [(True, "auto"), (False, "")])
def test_resume_may_be_the_switch_that_it_was_in_a_file(
    tmp_path: Path, switch: bool, resume: str
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"resume": switch}))
    assert read_fields(path)["resume"] == resume


def test_where_a_run_may_end_early_its_evaluations_decide(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(to_json(parse("--early-stopping-patience 2 --eval-steps 5")))
    changed = "--early-stopping-patience 2 --eval-steps 6 --max-bad-steps 3 --save-total-limit 1"
    assert differences(parse(changed), path) == ["--eval-steps was 5, now 6"]
