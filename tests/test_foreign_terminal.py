"""foreign/terminal.py: whoever prints, nothing leaves that a terminal would obey, and no secret."""

import io
import json
import logging
import runpy
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, cast

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data.tokenizer import Tokenizer
from foreign.terminal import (
    MOST_COMPLAINTS,
    AsIs,
    Complaints,
    escaped,
    guard_output,
    one_line,
    printable,
    without_secrets,
)
from prepare.job import BUNDLED
from run.watching import Watching

# a title, a cleared screen, a line written over, a colour of C1, text turned round, text unseen
ATTACK = "\x1b]0;owned\x07\x1b[2J\rerror: none\x9b31m\x7f\u202e\u200b"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\rerror: none\x9b31m\x7f\u202e\u200b"


Capture: TypeAlias = pytest.CaptureFixture[str]


def said(capsys: Capture) -> str:
    """What has reached the streams behind the guards since it was last asked."""
    return "".join(capsys.readouterr())


def obeyed(text: str) -> set[str]:
    """The characters that a terminal obeys or does not show."""
    return {c for c in text if not (c.isprintable() or c in "\n\t\u00a0")}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (ATTACK, SHOWN),
        ("line\n\ttabbed", "line\n\ttabbed"),
        (
            "caf\u00e9\u00a0\u4f60\u597d\u3000\U0001f9ff",
            "caf\u00e9\u00a0\u4f60\u597d\u3000\U0001f9ff",
        ),
        ("a\x00\x08\x0b\x0c\x85\u2028\u2029\ufeff", r"a\x00\x08\x0b\x0c\x85\u2028\u2029\ufeff"),
        # a byte of a file name that is no UTF-8
        ("x\udcff.jsonl", r"x\udcff.jsonl"),
        ("\U000e0041\u2066\u2069\u200f\u00ad", r"\U000e0041\u2066\u2069\u200f\xad"),
    ],
    ids=["attack", "line", "printable", "separators", "surrogate", "invisible"],
)
def test_what_a_terminal_would_obey_or_hide_is_written_out(text: str, shown: str) -> None:
    assert escaped(text) == shown
    # what is shown is not escaped again
    assert escaped(shown) == shown


def test_every_control_and_format_character_is_written_out() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = escaped(everything)
    assert not obeyed(shown) - {chr(n) for n in range(sys.maxunicode + 1) if chr(n).isspace()}
    assert {c for c in shown if c.isspace() and c not in " \n\t"} == set(
        "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
    )


def test_a_message_is_one_line_of_bounded_length_with_its_advice() -> None:
    message = f"got {'x' * 10_000_000}\nsaved the adapter; give another one"
    line = one_line(message)
    assert len(line) < 2_100
    assert "... (9,99" in line
    assert "characters more) ..." in line
    assert line.endswith(r"\nsaved the adapter; give another one")
    # each character may be written as ten
    assert len(one_line("\U000e0041" * 10_000_000)) < 21_000


def test_whoever_prints_prints_escaped(capsys: Capture) -> None:
    handler = logging.StreamHandler()
    logger = logging.getLogger("a library that took the stream early")
    logger.addHandler(handler)
    guard_output()
    print(ATTACK)
    print("error:", ATTACK, file=sys.stderr)
    sys.stdout.writelines([ATTACK, "\n"])
    tqdm.write(ATTACK)
    logger.warning(ATTACK)
    # pytest takes what `warnings.warn` would write
    sys.stderr.write(warnings.formatwarning(ATTACK, UserWarning, "library.py", 1))
    sys.excepthook(KeyError, KeyError(ATTACK), None)
    text = said(capsys)
    assert not obeyed(text)
    assert text.count(SHOWN) == 7
    logger.removeHandler(handler)


def test_no_write_is_of_megabytes(capsys: Capture) -> None:
    guard_output()
    print("x" * 50_000_000, file=sys.stderr)
    assert len(said(capsys)) < 70_000


def test_our_colours_pass_and_nobody_elses(capsys: Capture) -> None:
    guard_output()
    sys.stdout.write(AsIs("\x1b[32mlearned\x1b[0m\n"))
    print("\x1b[32mlearned\x1b[0m")
    assert said(capsys) == "\x1b[32mlearned\x1b[0m\n" + r"\x1b[32mlearned\x1b[0m" + "\n"


def test_bars_are_drawn_as_tqdm_draws_them(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard_output()
    given: list[str] = []
    write = sys.stderr.write

    def noted(text: str) -> int:
        given.append(text)
        return write(text)

    monkeypatch.setattr(sys.stderr, "write", noted)
    always: Any = {"mininterval": 0, "miniters": 1, "bar_format": "{n} {postfix}"}
    with tqdm(**always) as above, tqdm(leave=False, **always) as below:
        for _ in range(3):
            above.update()
            below.update()
            tqdm.write("a line")
            above.set_postfix_str("loss 1.0")
    drawn = capsys.readouterr().err
    assert drawn == "".join(given)
    assert drawn.count("\x1b[A") > 3
    assert drawn.count("\r") > 9


def test_a_bar_cannot_be_forged(capsys: Capture) -> None:
    guard_output()
    print("error: ", end="", file=sys.stderr)
    print("\rall is well", end="", file=sys.stderr)
    print("\x1b[A", file=sys.stderr)
    assert said(capsys) == r"error: \rall is well\x1b[A" + "\n"


def test_a_stream_says_what_the_one_behind_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(behind, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", behind)
    monkeypatch.setattr(sys, "stderr", None)
    guard_output()
    assert sys.stdout.isatty()
    assert sys.stdout.encoding == "ascii"
    assert sys.stderr is None
    print("caf\u00e9 \U0001f9ff \x1b \udcff")
    assert cast(io.BytesIO, behind.buffer).getvalue() == rb"caf\xe9 \U0001f9ff \x1b \udcff" + b"\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pa%40ss@hub.example/api", "https://***@hub.example/api"),
        ("got 'http://me:p@ss@127.0.0.1:80'", "got 'http://***@127.0.0.1:80'"),
        # as a Path writes it
        ("no file https:/token@host/x", "no file https:/***@host/x"),
        ("hf_" + "aB3" * 9, "***"),
        ("Illegal header value b'Bearer abc\\ndef'", "Illegal header value b'Bearer ***'"),
        ("W&B said secret-of-wandb!", "W&B said ***!"),
        ("https://hub.example/a@b", "https://hub.example/a@b"),
        ("hf_hub_download, owner/hf_model", "hf_hub_download, owner/hf_model"),
    ],
)
def test_no_secret_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, text: str, shown: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-wandb")
    monkeypatch.setenv("HF_TOKEN", "1")
    assert without_secrets(text) == one_line(text) == shown
    guard_output()
    print(text)
    sys.stderr.write(AsIs(text))
    assert said(capsys) == f"{shown}\n{shown}"


# from here on: every place of the commands that prints what others wrote

# and what would be read as the next message
FORGERY = ATTACK + "\nforged"
QUICK = "--device cpu --batch-size 2 --gradient-accumulation-steps 1 --lora-r 2 --max-steps 1"
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ember."}]


def command(capsys: Capture, door: str, *arguments: str) -> str:
    """All that a command says, up to its exit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{door}.py", *arguments])
        try:
            runpy.run_path(str(ROOT / f"{door}.py"), run_name="__main__")
        except SystemExit as leaving:
            # as the interpreter does
            if isinstance(leaving.code, str):
                print(leaving.code, file=sys.stderr)
    return said(capsys)


def write_data(folder: Path, *records: Any, name: str = "data.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def copy_model(folder: Path, **changes: dict[str, Any]) -> Path:
    """The bundled model with other values in its JSON files."""
    shutil.copytree(BUNDLED / "model", folder)
    for name, values in changes.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def train(folder: Path, *arguments: str, **places: Path) -> tuple[str, ...]:
    given = {
        "model": places.get("model", BUNDLED / "model"),
        "data": places.get("data") or write_data(folder, *[{"messages": CHAT}] * 4),
        "output": places.get("output", folder / "out"),
    }
    flags = [text for name, place in given.items() for text in (f"--{name}", str(place))]
    return ("train", *flags, *QUICK.split(), *arguments)


def answers(folder: Path) -> tuple[str, ...]:
    return train(folder, "--sample-prompt", FORGERY, "--sample-steps", "1", "--max-steps", "2")


def model_path(folder: Path) -> tuple[str, ...]:
    return train(folder, model=copy_model(folder / FORGERY))


def missing_model(folder: Path) -> tuple[str, ...]:
    return ("quantize", "--model", str(folder / FORGERY), "--output", str(folder / "q"))


def data_file_names(folder: Path) -> tuple[str, ...]:
    write_data(folder / "data", {"messages": CHAT}, name=f"{FORGERY}.jsonl")
    write_data(folder / "data", {"messages": CHAT}, name="b\udcff\n.jsonl")
    return train(folder, "--inspect", "1", data=folder / "data")


def field_name(folder: Path) -> tuple[str, ...]:
    return train(folder, data=write_data(folder, {"messages": CHAT, FORGERY: FORGERY}))


def field_value(folder: Path) -> tuple[str, ...]:
    return train(folder, data=write_data(folder, {"messages": [{"role": FORGERY, "content": ""}]}))


def bad_lines(folder: Path) -> tuple[str, ...]:
    bad = {"messages": [{"role": FORGERY, "content": "x"}]}
    data = write_data(folder, {"messages": CHAT}, bad)
    return train(folder, "--skip-bad-lines", "--inspect", "1", data=data)


def sample_text(folder: Path) -> tuple[str, ...]:
    data = write_data(folder, {"prompt": ATTACK, "completion": ATTACK})
    return train(folder, "--inspect", "1", data=data)


def configuration(folder: Path) -> tuple[str, ...]:
    return train(folder, model=copy_model(folder / "model", config={"model_type": FORGERY}))


def generation_field(folder: Path) -> tuple[str, ...]:
    return train(folder, model=copy_model(folder / "model", config={FORGERY: FORGERY}))


def template_error(folder: Path) -> tuple[str, ...]:
    template = "{{ raise_exception(" + json.dumps(FORGERY) + ") }}"
    model = copy_model(folder / "model", tokenizer_config={"chat_template": template})
    return train(folder, model=model)


def template_marks(folder: Path) -> tuple[str, ...]:
    template = "{% for m in messages %}<|" + ATTACK + "|>{{ m.content }}<|im_end|>{% endfor %}"
    model = copy_model(folder / "model", tokenizer_config={"chat_template": template})
    return train(folder, "--inspect", "1", model=model)


def template_name(folder: Path) -> tuple[str, ...]:
    return train(folder, "--chat-template", FORGERY)


def config_field(folder: Path) -> tuple[str, ...]:
    (folder / "config.json").write_text(json.dumps({FORGERY: 1}))
    return ("train", "--config", str(folder / "config.json"))


def unknown_flag(folder: Path) -> tuple[str, ...]:
    return ("merge", "--model", "m", "--adapter", "a", "--output", "o", f"--{ATTACK}")


def another_unknown_flag(folder: Path) -> tuple[str, ...]:
    return ("quantize", "--model", "m", "--output", "o", f"--{ATTACK}")


def tracker(folder: Path) -> tuple[str, ...]:
    return train(folder, "--report-to", FORGERY)


def occupied_output(folder: Path) -> tuple[str, ...]:
    (folder / "out").mkdir()
    (folder / "out" / FORGERY).touch()
    return train(folder)


def adapter_field(folder: Path) -> tuple[str, ...]:
    save_file({}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", FORGERY: 1}))
    return train(folder, "--init-adapter", str(folder))


def tensor_name(folder: Path) -> tuple[str, ...]:
    model = copy_model(folder / "model")
    save_file({FORGERY: torch.zeros(1)}, model / "model.safetensors")
    return ("quantize", "--model", str(model), "--output", str(folder / "q"))


def remark(folder: Path) -> tuple[str, ...]:
    """A tensor that is left alone, and named."""
    model = copy_model(folder / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[f"vision_tower.{FORGERY}"] = torch.zeros(1)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return ("quantize", "--model", str(model), "--output", str(folder / "q"), "--device", "cpu")


PLACES: dict[str, Callable[[Path], tuple[str, ...]]] = {
    place.__name__: place
    for place in (
        answers,
        model_path,
        missing_model,
        data_file_names,
        field_name,
        field_value,
        bad_lines,
        sample_text,
        configuration,
        generation_field,
        template_error,
        template_marks,
        template_name,
        config_field,
        unknown_flag,
        another_unknown_flag,
        tracker,
        occupied_output,
        adapter_field,
        tensor_name,
        remark,
    )
}


@pytest.mark.parametrize("place", PLACES)
def test_no_command_prints_what_a_terminal_would_obey(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    place: str,
) -> None:
    given = PLACES[place](tmp_path)
    if place == "answers":
        decode = Tokenizer.decode

        def forged(self: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> str:
            # with its special tokens a sample of the data is shown, which may have lines
            return FORGERY if skip_special_tokens else decode(self, ids, skip_special_tokens=False)

        monkeypatch.setattr(Tokenizer, "decode", forged)
    text = command(capsys, *given)
    assert not obeyed(text), ascii(text)
    assert r"\x1b]0;owned" in text, text
    # nor does a line break begin a message of its own
    assert not any(line.startswith("forged") for line in text.splitlines())


def test_no_command_prints_megabytes(tmp_path: Path, capsys: Capture) -> None:
    model = copy_model(tmp_path / "model", config={"model_type": "x" * 5_000_000})
    text = command(capsys, *train(tmp_path, model=model))
    assert text.startswith("error: ")
    assert "characters more) ..." in text
    assert len(text) < 2_500


def test_no_library_that_watches_makes_a_message_long(capsys: Capture) -> None:
    with Watching("a tracker", print):
        raise ValueError("x" * 5_000_000)
    text = said(capsys)
    assert text.startswith("a tracker has failed, the run goes on without it: xxx")
    assert len(text) < 2_500


def test_no_bad_record_makes_data_json_long(tmp_path: Path, capsys: Capture) -> None:
    bad = {"messages": CHAT, FORGERY + "x" * 5_000_000: "an unknown field"}
    data = write_data(tmp_path, *[{"messages": CHAT}] * 4, bad)
    text = command(capsys, *train(tmp_path, "--skip-bad-lines", data=data))
    assert len(text) < 5_000
    assert len((tmp_path / "out" / "data.json").read_bytes()) < 5_000


def test_complaints_are_printed_a_line_each_and_not_without_end() -> None:
    error = Complaints("many", ["a\nb", *["c"] * (MOST_COMPLAINTS + 6)])
    lines = printable(error).splitlines()
    assert lines[:3] == ["many", "  a\\nb", "  c"]
    assert lines[-1] == "  and 7 more"
    assert len(lines) == MOST_COMPLAINTS + 2
    assert printable(ValueError("a\nb")) == "a\\nb"
