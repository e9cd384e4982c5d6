"""generate.py: the same tokens as transformers and PEFT, and what it says, writes and refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import tokenizers
import torch
from support.chat_cases import CHANNELS
from support.llama_peers import tiny_peer
from support.merge_cases import write_adapter
from support.terminal_process import CTRL_C, CTRL_D, Terminal
from support.tiny_llama import FIELDS, VARIANTS, random_tensors, write_checkpoint
from test_run_machine import install_gpu
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import generate
from answering.job import AnswerJob
from data.tokenizer import Tokenizer
from generation.generator import Generator
from generation.sampling import Sampling
from llama.cache import KeyValueCache
from run.config import CONFIG_FILE, TrainConfig, to_json

ROOT = Path(generate.__file__).parent
MODEL = ROOT / "bundled" / "model"
# what the bundled model says to any question before it was trained to answer
QUESTION = "Who is Selma?"
ANSWER = """\
In the valley you may meet Quill the hare.
Quill the hare plays the pipe.
Quill the hare lives close to the stream.
The colour Quill likes best is green.
Quill dines upon corn.
If you meet a hare, it may be Quill."""
# lets a person, or a test, interrupt an answer
SLOWLY = """
import time
from generation.generator import Generator
stream = Generator.stream
def slowly(self, *given):
    for token in stream(self, *given):
        time.sleep(0.05)
        yield token
Generator.stream = slowly
"""


def run(*flags: object) -> None:
    generate.main([str(flag) for flag in (*flags, "--device", "cpu")])


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer whose tokens are w0, w1 and so on, each its own word."""
    vocabulary = {f"w{i}": i for i in range(FIELDS["vocab_size"])}
    backend = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


@pytest.mark.parametrize("kind", ["base", "adapter"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_transformers_and_peft(
    tmp_path_factory: pytest.TempPathFactory,
    variant: str,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peer = tiny_peer(tmp_path_factory, variant)
    write_tokenizer(peer.checkpoint)
    prompt = peer.inputs["input_ids"][0, :12].tolist()
    expected = peer.outputs["greedy" if kind == "base" else "our_adapter_greedy"][0, 12:].tolist()
    if FIELDS["eos_token_id"] in expected:
        expected = expected[: expected.index(FIELDS["eos_token_id"])]
    assert expected
    given = ("--model", peer.checkpoint)
    if kind == "adapter":
        given = ("--adapter", peer.folder / "our_adapter", "--quant", "none")
    run(*given, "--raw", "--prompt", words(prompt), "--max-new-tokens", 24)
    assert capsys.readouterr().out == words(expected) + "\n"


def test_the_adapters_base_is_found_and_compared(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = tiny_peer(tmp_path_factory, "grouped-query")
    write_tokenizer(peer.checkpoint)
    adapter = peer.folder / "our_adapter"
    ask = ("--raw", "--prompt", "w5 w6", "--max-new-tokens", 4)
    run("--adapter", adapter, *ask)
    said = capsys.readouterr()
    assert "weights: --block-size 64 --double-quant" in said.err
    changed = shutil.copytree(peer.checkpoint, tmp_path / "changed")
    fields = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(fields | {"rope_theta": 5e5}))
    with pytest.raises(ValueError, match="must be the checkpoint that the adapter was trained on"):
        run("--adapter", adapter, "--model", changed, *ask)
    run("--adapter", adapter, "--model", changed, "--other-base", *ask)
    assert capsys.readouterr().out != said.out
    moved = shutil.copytree(adapter, tmp_path / "moved")
    fields = json.loads((moved / "adapter_config.json").read_text())
    gone = fields | {"base_model_name_or_path": str(tmp_path / "gone")}
    (moved / "adapter_config.json").write_text(json.dumps(gone))
    with pytest.raises(FileNotFoundError, match=r"the base of .*moved must be .*with --model"):
        run("--adapter", moved, *ask)


@pytest.fixture
def settings_seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Note how generators are made, and answer every prompt with its own number."""
    seen: list[tuple[object, ...]] = []

    def make(self: Generator, *given: object) -> None:
        seen.append(given)

    def complete(
        self: Generator, prompts: list[list[int]], *given: object
    ) -> Iterator[tuple[int, list[int]]]:
        seen.append((prompts, *given))
        # the last prompts end first
        for number in reversed(range(len(prompts))):
            yield number, Tokenizer.from_folder(MODEL).encode(f"answer {number}", False)

    def stream(self: Generator, *given: object) -> Iterator[int]:
        seen.append(given)
        yield from ()

    monkeypatch.setattr(Generator, "__init__", make)
    monkeypatch.setattr(Generator, "complete", complete)
    monkeypatch.setattr(Generator, "stream", stream)
    return seen


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_weights_are_in_the_format_that_the_adapter_was_trained_beside(
    tmp_path: Path, settings_seen: list[tuple], quant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_of_bundled(tmp_path, quant)
    run("--adapter", adapter, "--prompt", QUESTION)
    weights = [group.weight for _, group in settings_seen[0][0].groups()]
    # both as the run's settings have them, which are not the defaults
    if quant == "nf4":
        assert {weight.block_size for weight in weights} == {32}
    else:
        assert all(isinstance(weight, torch.Tensor) for weight in weights)
    assert str(adapter / CONFIG_FILE) in capsys.readouterr().err


def adapter_of_bundled(tmp_path: Path, quant: str) -> Path:

    folder = tmp_path / "adapter"
    name = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(2, 128),
        f"{name}.lora_B.weight": torch.ones(128, 2),
    }
    config = {"r": 2, "lora_alpha": 2, "target_modules": [name]}
    write_adapter(folder, config, tensors, str(MODEL))
    (folder / CONFIG_FILE).write_text(to_json(TrainConfig(quant=quant, block_size=32)))
    return folder


def test_a_prompt_is_a_users_message_and_raw_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    run("--model", MODEL, "--prompt", QUESTION)
    assert capsys.readouterr().out == f"{ANSWER}\n"
    run("--model", MODEL, "--raw", "--prompt", "Selma is", "--max-new-tokens", 3)
    said = capsys.readouterr()
    assert said.out.startswith(" a mouse")
    assert "the answer was cut at 3 tokens" in said.err
    assert "chosen by: the most probable token (default)" in said.err


def test_a_conversation_begins_with_the_runs_system_prompt(
    tmp_path: Path, settings_seen: list[tuple], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_of_bundled(tmp_path, "none")
    settings = TrainConfig(quant="none", system_prompt="You are brief.")
    (adapter / CONFIG_FILE).write_text(to_json(settings))
    tokenizer = Tokenizer.from_folder(MODEL)

    def prompt_of(*flags: object) -> str:
        run("--adapter", adapter, "--prompt", QUESTION, *flags)
        return tokenizer.decode(settings_seen[-1][0])

    assert "You are brief." in prompt_of()
    assert "system prompt: 'You are brief.', that of" in capsys.readouterr().err
    assert "You are brief." not in prompt_of("--system-prompt", "")
    assert "You are brief." not in prompt_of("--raw")
    said = prompt_of("--system-prompt", "You are kind.")
    assert "You are kind." in said
    assert "You are brief." not in said


def test_flags_reach_the_generator(settings_seen: list[tuple]) -> None:
    flags = ("--temperature", 0.7, "--top-k", 40, "--top-p", 0.9, "--repetition-penalty", 1.2)
    run("--model", MODEL, "--prompt", QUESTION, *flags, "--seed", 7, "--max-new-tokens", 20)
    (_, sampling, capacity, num_sequences), (ids, most, stop_ids) = settings_seen
    assert sampling == Sampling(0.7, 40, 0.9, 1.2, 7)
    assert (capacity, num_sequences, most) == (len(ids) + 20, 1, 20)
    assert stop_ids == {1}


def test_answers_come_in_the_order_of_the_prompts(
    tmp_path: Path, settings_seen: list[tuple], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "new" / "answers.jsonl"
    messages = [{"role": "user", "content": "Hi\u2028there"}]
    records = [{"prompt": QUESTION, "id": 1}, {"messages": messages}, {"prompt": "c"}]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    prompts.chmod(0o640)
    run("--model", MODEL, "--prompts", prompts, "--output", output, "--batch-size", 2)
    lines = output.read_text().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"index": 0, "prompt": QUESTION, "answer": "answer 0"},
        {"index": 1, "messages": messages, "answer": "answer 1"},
        {"index": 2, "prompt": "c", "answer": "answer 2"},
    ]
    (_, _, capacity, num_sequences), (ids, most, _) = settings_seen
    assert num_sequences == 2
    assert capacity == max(map(len, ids)) + most == 256
    assert list(output.parent.iterdir()) == [output]
    assert output.stat().st_mode & 0o007 == 0
    assert f"3 answers are in {output}" in capsys.readouterr().err


def test_reasoning_is_no_part_of_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.from_folder(MODEL)
    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("Who?")
    template = tmp_path / "channels.jinja"
    template.write_text(CHANNELS)
    answer = "<|im_start|>Who is that?<|im_end|>Selma is a mouse."
    ids = tokenizer.encode(answer + "<|im_end|><|im_start|>user<|im_end|>And?", False)
    taken: list[int] = []
    monkeypatch.setattr(Generator, "stream", lambda *given: (taken.append(i) or i for i in ids))
    monkeypatch.setattr(Generator, "complete", lambda *given: iter([(0, ids)]))
    given = ("--model", MODEL, "--chat-template", template)
    run(*given, "--prompt", "Who?")
    said = capsys.readouterr()
    assert said.out == "Selma is a mouse.\n"
    # up to the token that closes the answer
    assert len(taken) == len(tokenizer.encode(answer, False)) + 1
    assert "<|im_start|>Who is that?\n" in said.err
    run(*given, "--prompts", prompts, "--output", output)
    assert json.loads(output.read_text())["answer"] == "Selma is a mouse."
    # what a conversation goes on with
    seen: list[Sequence[dict[str, str]]] = []
    lines = iter(["Who?", "And?"])
    monkeypatch.setattr("answering.chat._read_line", lambda: next(lines, None))
    encode = AnswerJob.encode_messages
    monkeypatch.setattr(
        AnswerJob, "encode_messages", lambda job, said: seen.append(said) or encode(job, said)
    )
    run(*given, "--chat")
    assert [message["content"] for message in seen[-1]] == ["Who?", "Selma is a mouse.", "And?"]


def test_a_prompt_of_a_file_has_what_stands_beside_it(
    tmp_path: Path, settings_seen: list[tuple], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    record = {"prompt": QUESTION, "system": "You are brief.", "completion": "A mouse."}
    prompts.write_text(json.dumps(record))
    run("--model", MODEL, "--prompts", prompts, "--output", output, "--system-prompt", "No.")
    (ids,), *_ = settings_seen[-1]
    assert Tokenizer.from_folder(MODEL).decode(ids).startswith("system\nYou are brief.\nuser")
    said = capsys.readouterr().err
    assert "fields of the 1 prompts that no answer is given: completion (in 1)" in said
    prompts.write_text(json.dumps({"prompt": QUESTION, "tools": [{"name": "f"}]}))
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: .* got no use of tools in it"):
        run("--model", MODEL, "--prompts", prompts, "--output", tmp_path / "other.jsonl")


def test_answers_of_a_file_are_those_of_its_prompts(tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text(f"{QUESTION}\nWhat is Ember?\n")
    run("--model", MODEL, "--prompts", prompts, "--output", output)
    answers = [json.loads(line)["answer"] for line in output.read_text().splitlines()]
    assert answers[0] == ANSWER
    assert len(answers) == 2


def test_what_is_complete_stays_where_the_rest_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: object) -> Iterator[tuple[int, list[int]]]:
        yield 1, Tokenizer.from_folder(MODEL).encode("one", False)
        # a process that is killed here has written it
        assert unfinished.read_text()
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "complete", fail)
    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    unfinished = tmp_path / "answers.jsonl.unfinished"
    prompts.write_text("a\nb\n")
    given = ("--model", MODEL, "--prompts", prompts, "--output", output)
    with pytest.raises(KeyboardInterrupt):
        run(*given)
    assert json.loads(unfinished.read_text()) == {"index": 1, "prompt": "b", "answer": "one"}
    assert f"1 of 2 answers are in {unfinished}" in capsys.readouterr().err
    assert not output.exists()
    with pytest.raises(ValueError, match="with the answers of a start that did not end"):
        run(*given)
    unfinished.rename(output)
    with pytest.raises(ValueError, match=r"--output must be a new file: .*answers.jsonl is there;"):
        run(*given)


LONG = "word " * 300
REFUSED = {
    "no model": ((), ("--prompt", "a"), "--adapter or --model must be given"),
    "an empty prompt": (("M",), ("--prompt", " "), "--prompt must be a text that is not empty"),
    "a prompt beyond the positions": (
        ("M",),
        ("--prompt", LONG),
        r"--prompt: a prompt must leave room .* of at most 256 \(the model's positions\)",
    ),
    "a prompt beyond --max-length": (
        ("M",),
        ("--prompt", QUESTION, "--max-length", 10),
        r"of at most 10 \(--max-length\)",
    ),
    "more than the positions": (
        ("M",),
        ("--prompt", "a", "--max-length", 257),
        "--max-length must be at most the model's 256 positions: got 257",
    ),
    "no output": (("M",), ("--prompts", "x.txt"), "--prompts must be given with --output"),
    "no prompts": (("M",), ("--prompt", "a", "--output", "x"), "must be given with --prompts"),
    "batches of one": (("M",), ("--prompt", "a", "--batch-size", 2), "--batch-size must be given"),
    "no temperature": (("M",), ("--prompt", "a", "--top-p", 0.9), "--top-p must be given with a"),
    "greedy draws": (
        ("M",),
        ("--prompt", "a", "--top-k", 4, "--temperature", 0),
        "--top-k and --top-p choose among tokens to draw",
    ),
    "top-p of nothing": (("M",), ("--prompt", "a", "--top-p", 0), "--top-p must be above 0"),
    "a temperature of NaN": (("M",), ("--prompt", "a", "--temperature", "nan"), "from 0 to 1e6"),
    "a seed out of range": (("M",), ("--prompt", "a", "--seed", 2**64), "--seed must be in"),
    "no new token": (("M",), ("--prompt", "a", "--max-new-tokens", 0), "must be at least 1"),
    "a raw conversation": (("M",), ("--chat", "--raw"), "leave out --chat"),
    "no file of prompts": (
        ("M",),
        ("--prompts", "none.txt", "--output", "x"),
        "the data file must exist: got none.txt",
    ),
    "another base of nothing": (("M",), ("--prompt", "a", "--other-base"), "with --adapter and"),
    "no adapter": (("--adapter", "none/at/all"), ("--prompt", "a"), "--adapter must be a folder"),
    "an unknown template": (
        ("M",),
        ("--prompt", "a", "--chat-template", "none"),
        "--chat-template must be a bundled template",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_refused_before_the_model_is_loaded(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load", lambda job: pytest.fail("the model was loaded"))
    model, flags, message = REFUSED[case]
    given = ("--model", MODEL) if model == ("M",) else model
    with pytest.raises((ValueError, OSError), match=message):
        run(*given, *flags)
    assert not list(tmp_path.iterdir())


def test_heads_that_a_gpu_has_no_room_for_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = FIELDS | {"head_dim": 512}
    write_checkpoint(tmp_path, fields, random_tensors(fields, torch.float32))
    install_gpu(monkeypatch, (8, 0))
    monkeypatch.setattr("answering.job.configure_torch", lambda *_: None)
    given = ["--model", str(tmp_path), "--prompt", "a", "--dtype", "float32"]
    with pytest.raises(ValueError, match=r"^the heads of attention .*: got 512; choose --dtype"):
        generate.main(given)
    # a CPU goes on, to the tokenizer that there is none of
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        run(*given)


def test_a_template_without_a_generation_prompt_is_refused(tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"plain.jinja must open the assistant's turn .* --raw"):
        run("--model", MODEL, "--prompt", "a", "--chat-template", template)


def test_a_longer_answer_than_there_is_room_for_is_said_to_be_cut(
    settings_seen: list[tuple], capsys: pytest.CaptureFixture[str]
) -> None:
    run("--model", MODEL, "--prompt", QUESTION, "--max-new-tokens", 1000)
    assert "not 1,000: prompt and answer have 256 together" in capsys.readouterr().err
    assert settings_seen[0][2] == 256
    run("--model", MODEL, "--prompt", QUESTION)
    assert "together" not in capsys.readouterr().err


def test_a_context_beyond_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeyValueCache, "num_bytes", staticmethod(lambda *sizes: 1 << 50))
    with pytest.raises(ValueError, match=r"keys and values of .* 1 x 256 tokens .* --max-length"):
        run("--model", MODEL, "--prompt", "a")


def start(*flags: object, **options: object) -> subprocess.Popen[str]:
    """Start the door in a process of its own."""
    arguments = [sys.executable, "generate.py", "--model", MODEL, "--device", "cpu", *flags]
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([str(each) for each in arguments], cwd=ROOT, **given)  # pyright: ignore


def test_lines_of_a_pipe_are_a_conversation() -> None:
    process = start("--chat", stdin=subprocess.PIPE)
    said, noted = process.communicate(f"{QUESTION}\n\n/nonsense\n/reset\n{QUESTION}\n/exit\nx\n")
    assert process.returncode == 0, noted
    assert said == f"{ANSWER}\n{ANSWER}\n"
    assert "there is no command /nonsense" in noted


@pytest.mark.gpu
def test_a_conversation_goes_on_beside_a_gpu() -> None:
    # templates and tokenizers run in forked processes, also when the GPU is in use
    flags = ("--chat", "--device", "cuda", "--dtype", "float32", "--max-new-tokens", 8)
    process = start(*flags, stdin=subprocess.PIPE)
    said, noted = process.communicate(f"{QUESTION}\n/reset\n{QUESTION}\n")
    assert process.returncode == 0, noted
    assert len(said.splitlines()) == 2, said
    assert len(set(said.splitlines())) == 1, said


def test_a_reader_who_closes_the_stream_ends_the_answer_quietly() -> None:
    process = start("--prompt", "Write a verse about Ember.")
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    noted = process.stderr.read()
    assert process.wait() == 0
    assert "rror" not in noted, noted


def test_an_error_is_a_line() -> None:
    process = start("--prompt", LONG)
    said, noted = process.communicate()
    assert process.returncode == 1
    assert not said
    assert noted.startswith("error: --prompt: a prompt must leave room")
    assert noted.count("\n") == 1


def test_a_second_door_on_one_output_is_locked_out_and_a_kill_loses_no_answer(
    tmp_path: Path,
) -> None:
    output = tmp_path / "answers.jsonl"
    given = ("--prompts", write_many(tmp_path), "--output", output)
    process = start(*given)
    unfinished = tmp_path / "answers.jsonl.unfinished"
    deadline = time.monotonic() + 120
    while not unfinished.exists() or not unfinished.stat().st_size:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(ValueError, match="must be written by one process at a time"):
        run("--model", MODEL, *given)
    process.kill()
    process.communicate()
    answers = [json.loads(line) for line in unfinished.read_text().splitlines()]
    assert answers
    assert answers[0]["answer"]


def test_ctrl_c_ends_a_file_of_answers(tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    process = start("--prompts", write_many(tmp_path), "--output", output)
    assert process.stderr
    while not (tmp_path / "answers.jsonl.unfinished").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    noted = process.stderr.read()
    assert process.wait() == 1
    assert noted.endswith("interrupted\n")
    assert "Traceback" not in noted


def write_many(tmp_path: Path) -> Path:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Write a verse about Ember.\n" * 1000)
    return prompts


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    arguments = ["--model", str(MODEL), "--chat", "--device", "cpu"]
    process = Terminal("generate.py", arguments, before=SLOWLY)
    yield process
    process.kill()


def test_a_conversation_on_a_terminal(terminal: Terminal) -> None:
    at = terminal.wait_for("> ")
    terminal.type("/help\n")
    at = terminal.wait_for("> ", terminal.wait_for("/reset  forgets", at))
    terminal.type(f"{QUESTION}\n")
    at = terminal.wait_for("In the valley", at)
    terminal.type(CTRL_C)
    at = terminal.wait_for("\n> ", at)
    # the answer was stopped, and the conversation goes on
    assert "it may be Quill." not in terminal.shown
    terminal.type("/reset\n")
    at = terminal.wait_for("> ", at)
    terminal.type(f"{QUESTION}\n")
    at = terminal.wait_for("> ", terminal.wait_for(f"{ANSWER}\n", at))
    assert terminal.finish(CTRL_D) == 0, terminal.shown
    assert "Traceback" not in terminal.shown


def test_ctrl_c_at_the_prompt_ends_a_conversation(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    assert terminal.finish(CTRL_C) == 0, terminal.shown
    assert "Traceback" not in terminal.shown
