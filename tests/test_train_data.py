"""train.py and its data: the audit before step 1, parts set aside, the same samples on resume."""

import json
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import load_file, save_file
from support.chat_cases import CHANNELS
from support.short_model import short_model
from support.train_process import cut_off
from test_train import BUNDLED, FEW, rows_of, small_data

import train
from data.dataset import load_dataset
from data.tokenizer import Tokenizer
from prepare.job import check
from run.ranks import Ranks


def run(data: Path, output: Path, flags: str = "") -> None:
    train.main(f"--model {short_model()} --data {data} --output {output} {FEW} {flags}".split())


def test_a_fraction_is_set_aside_by_content_and_evaluated_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(tmp_path, 40)
    run(data, tmp_path / "out", "--eval-fraction 0.25")
    facts = json.loads((tmp_path / "out" / "data.json").read_bytes())
    num_train, num_eval = (facts[name]["samples"] for name in ("train", "eval"))
    assert num_train + num_eval == 40
    assert 0 < num_eval < 20
    assert all("eval_loss" in rows_of(tmp_path / "out")[at] for at in (0, -1))
    said = capsys.readouterr().out
    assert f"{num_train} samples to learn from, {num_eval} to evaluate on" in said


def test_several_data_sets_are_learned_from_by_their_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats, pairs, output = small_data(tmp_path, 3), tmp_path / "pairs.jsonl", tmp_path / "out"
    lines = (json.dumps({"prompt": "a" * i, "completion": "b"}) for i in range(1, 9))
    pairs.write_text("\n".join(lines))
    arguments = f"--model {short_model()} --data {chats}=2 --data {pairs}=0.5 --output {output}"
    train.main(f"{arguments} {FEW} --max-steps -1 --epochs 2".split())
    said = capsys.readouterr().out
    assert f"{chats}: weight 2, 6 samples an epoch of its 3, " in said
    assert f"{pairs}: weight 0.5, 4 samples an epoch of its 8, " in said
    figures = json.loads((output / "data.json").read_bytes())["train"]["sets"]
    # two epochs have all of one twice two times, and of the other once
    num_tokens = 4 * figures[str(chats)]["tokens"] + figures[str(pairs)]["tokens"]
    last = rows_of(output)[-1]
    assert (last["step"], last["epoch"], last["tokens"]) == (6, 2.0, num_tokens)
    card = (output / "README.md").read_text()
    assert "| `--data` | small.jsonl=2, pairs.jsonl=0.5 |" in card


def test_it_is_said_which_files_are_read_and_that_a_template_is_another_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, template = tmp_path / "x.jsonl", tmp_path / "other.jinja"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    data.write_text((json.dumps({"messages": chat}) + "\n") * 3)
    template.write_text(
        "{% for m in messages %}<|one_{{ m.role }}|>{{ bos_token + m.content }}<|two|>{% endfor %}"
    )
    run(data, tmp_path / "out", f"--chat-template {template} --inspect 1")
    said = capsys.readouterr().out
    assert said.splitlines()[0] == f"--data: reading {data}"
    warning = "warning: the chat template .*other.jinja has marks that are no tokens of this "
    assert re.search(rf"{warning}tokenizer: <\|two\|> is \d tokens; records .* it: 3;", said), said


def test_a_chat_token_that_a_base_model_was_never_trained_on_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(short_model(), tmp_path / "base"))
    end = Tokenizer.from_folder(model).added_ids["<|im_end|>"]
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][end] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    data = small_data(tmp_path)
    line = f"--model {model} --data {data} --output {tmp_path / 'out'} --inspect 1 --device cpu"
    train.main(line.split())
    said = capsys.readouterr().out
    assert re.search(r"warning: .*never trained on, .* equal: <\|im_end\|>; records", said), said


def test_fields_are_lost_only_where_a_flag_names_them(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    records = [json.loads(line) for line in data.read_text().splitlines()]
    lines = [json.dumps({**record, "mood": "m", "voice": 1}) for record in records]
    data.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r":1: .*must have no field that .*got mood, voice beside"):
        run(data, tmp_path / "out")
    run(data, tmp_path / "out", "--ignore-fields mood,,voice")


def test_the_parts_do_not_overlap_and_do_not_move(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(BUNDLED / "model")
    lines = (BUNDLED / "data.jsonl").read_text().splitlines()[:100]

    def parts(lines: list[str]) -> tuple[list, list]:
        path = tmp_path / "x.jsonl"
        path.write_text("\n".join(lines))
        dataset = load_dataset([path], tokenizer, vocab_size=tokenizer.vocab_size)
        train_part, eval_part = dataset.split(0.3)
        assert dataset.num_tokens == train_part.num_tokens + eval_part.num_tokens
        return list(train_part.samples), list(eval_part.samples)

    # every sample twice: both copies are on one side
    learned, evaluated = parts(lines[:50] * 2)
    assert len(learned) + len(evaluated) == 100
    assert not any(sample in learned for sample in evaluated)
    # more data, in another order, moves nothing
    more_learned, more_evaluated = parts(lines[::-1])
    assert all(sample in more_learned for sample in learned)
    assert all(sample in more_evaluated for sample in evaluated)
    with pytest.raises(ValueError, match="must leave samples on both sides"):
        parts(lines[:1])


def test_a_run_goes_on_only_with_the_samples_it_began_with(tmp_path: Path) -> None:
    data, output = small_data(tmp_path), tmp_path / "out"
    flags = "--save-steps 2 --eval-fraction 0.3"
    run(data, output, flags)
    cut_off(output)
    content = data.read_text()
    data.write_text(content.replace("mouse", "moose").replace("heron", "herons"))
    before = sorted((p, p.read_bytes()) for p in output.rglob("*") if p.is_file())
    with pytest.raises(ValueError, match="--resume must be given the same samples: those of train"):
        run(data, output, f"{flags} --resume")
    assert before == sorted((p, p.read_bytes()) for p in output.rglob("*") if p.is_file())
    data.write_text(content)
    with pytest.raises(ValueError, match=r"--eval-fraction was 0\.3, now 0\.4"):
        run(data, output, "--save-steps 2 --eval-fraction 0.4 --resume")
    with pytest.raises(ValueError, match="--skip-bad-lines was False, now True"):
        run(data, output, f"{flags} --skip-bad-lines --resume")
    run(data, output, f"{flags} --resume --allow-truncation --dataset-num-proc 2")


def test_a_system_prompt_is_in_the_samples_and_before_the_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--model {short_model()} --data {small_data(tmp_path)} --device cpu --no-packing"
    given = [*flags.split(), "--sample-prompt", "Hi", "--output", str(tmp_path / "out")]
    jobs = [
        check([*given, "--system-prompt", text], Ranks(), datetime(2026, 1, 1))
        for text in ("Be kind.", "")
    ]
    with_it, without = [job.tokenizer.decode(job.prompt) for job in jobs if job and job.prompt]
    assert "Be kind." in with_it
    assert "Be kind." not in without
    assert "Be kind." in capsys.readouterr().out


def test_the_answer_to_the_prompt_has_no_reasoning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, output = tmp_path / "channels.jinja", tmp_path / "out"
    template.write_text(CHANNELS)
    tokenizer = Tokenizer.from_folder(short_model())
    ids = tokenizer.encode("<|im_start|>Who is that?<|im_end|>Selma is a mouse.", False)
    monkeypatch.setattr("training.answers.generate_greedy", lambda *given: ids)
    flags = f"--chat-template {template} --sample-prompt Hi --max-steps 1"
    run(small_data(tmp_path), output, flags)
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows] == ["Selma is a mouse."] * 2


def test_inspecting_shows_samples_and_writes_and_loads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load_model", None)
    run(small_data(tmp_path), tmp_path / "out", "--inspect 3")
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert [f"sample {i} of 12, [[what is learned]]:" in said for i in range(1, 5)] == [
        True,
        True,
        True,
        False,
    ]
    assert said.count("<|im_end|>\n]]") == 3


def test_what_would_teach_the_wrong_thing_is_refused_after_it_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"--data must fit --max-length.*\(100%\).*--allow-trunc"):
        run(small_data(tmp_path), output, "--max-length 20 --train-on all")
    assert "12 samples cut to 20 tokens (--max-length)" in capsys.readouterr().out
    assert not output.exists()
    run(small_data(tmp_path), output, "--max-length 20 --train-on all --allow-truncation")


def test_samples_to_evaluate_on_that_are_learned_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_data(tmp_path)
    run(data, tmp_path / "out", f"--eval-data {data} --inspect 1")
    said = capsys.readouterr().out
    assert "12 of the 12 samples to evaluate on are among those to learn from" in said


def test_a_bad_file_is_one_line_on_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": 3}\n')
    flags = f"--model {BUNDLED / 'model'} --data {path} --output {tmp_path / 'out'} --device cpu"
    done = subprocess.run(
        [sys.executable, "train.py", *flags.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"error: {path}:2: 'text' must be a string: got 3; correct it\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--eval-fraction 1", r"--eval-fraction must be in \[0, 1\): got 1"),
        ("--eval-fraction -0.1", r"--eval-fraction must be in \[0, 1\)"),
        ("--eval-fraction nan", "--eval-fraction must be"),
        ("--eval-fraction 0.1 --eval-data x.jsonl", "must be 0 where --eval-data is given"),
        ("--inspect -1", "--inspect must be at least 0"),
        ("--dataset-num-proc -1", "--dataset-num-proc must be at least 0"),
    ],
)
def test_flags_out_of_range_are_refused(tmp_path: Path, flags: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        run(tmp_path / "x.jsonl", tmp_path / "out", flags)
