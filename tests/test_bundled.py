"""bundled/: what is committed is what the generators write, and the model knows the valley."""

import json
import math
import shutil
from itertools import islice
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from support.micro_steps import NF4

from bundled import make
from bundled.corpus import documents
from bundled.instructions import held_out_set, training_set
from bundled.make import BOS, EOS, SEED
from bundled.valley import animals
from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from data.dataset import load_dataset
from data.tokenizer import Tokenizer
from llama.model import Llama
from rows.batch import Batch

FOLDER = Path(__file__).parents[1] / "bundled"
MODEL = FOLDER / "model"
MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(MODEL)


@pytest.fixture(scope="module")
def model() -> Llama:
    return load_model(open_checkpoint(MODEL), torch.device("cpu"), torch.float32, NF4)


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def questions(conversations: list[dict]) -> set[str]:
    return {conversation["messages"][0]["content"] for conversation in conversations}


def test_the_room_holds_a_checkpoint_and_data_in_two_megabytes() -> None:
    assert {path.name for path in MODEL.iterdir()} == MODEL_FILES
    written = [*MODEL.iterdir(), FOLDER / "data.jsonl", FOLDER / "eval.jsonl"]
    assert sum(path.stat().st_size for path in written) <= 2_000_000


def test_committed_instructions_are_what_the_generator_writes() -> None:
    assert read_lines("data.jsonl") == training_set()
    assert read_lines("eval.jsonl") == held_out_set()


def test_corpus_is_a_function_of_its_seed() -> None:
    first, again, other = (list(islice(documents(seed), 200)) for seed in (SEED, SEED, SEED + 1))
    assert first == again
    assert first != other


def test_held_out_questions_are_about_animals_that_are_never_taught() -> None:
    taught, held_out = questions(training_set()), questions(held_out_set())
    assert not taught & held_out
    names = {animal.name for animal in animals() if any(animal.name in q for q in held_out)}
    assert len(names) == 16
    assert not any(name in question for question in taught for name in names)


def test_every_name_is_one_animals() -> None:
    names = [animal.name for animal in animals()]
    assert len(set(names)) == len(names) == 64


def test_verses_have_four_lines() -> None:
    assert all(animal.verse.count("\n") == 3 for animal in animals())


def test_tokenizer_returns_the_corpus_unchanged(tokenizer: Tokenizer) -> None:
    for text in islice(documents(SEED + 1), 200):
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids) == text


def test_special_tokens_open_and_close_texts_and_turns(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    assert tokenizer.adds_bos
    config = json.loads((MODEL / "config.json").read_text())
    assert config["bos_token_id"] == tokenizer.bos_token_id
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["vocab_size"] == tokenizer.vocab_size


@pytest.mark.parametrize("name", ["data.jsonl", "eval.jsonl"])
def test_answers_fit_the_context_and_end_in_eos(name: str, tokenizer: Tokenizer) -> None:
    max_length = json.loads((MODEL / "config.json").read_text())["max_position_embeddings"]
    dataset = load_dataset(
        [FOLDER / name], tokenizer, max_length=max_length, vocab_size=tokenizer.vocab_size
    )
    assert dataset.format == "messages"
    assert dataset.counts.num_truncated == 0
    for sample in dataset.samples:
        learned = [label for label in sample.labels if label >= 0]
        assert learned.count(tokenizer.eos_token_id or 0) == 1
        # the template ends a turn with EOS and a newline
        assert learned[-2] == tokenizer.eos_token_id
        assert tokenizer.decode(learned[-1:]) == "\n"


def test_what_is_pretrained_is_what_the_model_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "NUM_STEPS", 10)
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    trained = make.pretrain(tokenizer)
    for parameter in trained.parameters():
        parameter.data = parameter.data.bfloat16().float()
    save_file(make.checkpoint_tensors(trained), tmp_path / "model.safetensors")
    shutil.copy(MODEL / "config.json", tmp_path)
    loaded = load_model(open_checkpoint(tmp_path), torch.device("cpu"), torch.float32, None)
    ids = torch.randint(0, make.VOCAB_SIZE, (2, 33))
    with torch.no_grad():
        expected = trained(ids)
    error = (loaded.logits(ids) - expected).abs().max() / expected.abs().max()
    # float32: each number is a sum of a few hundred products in another order
    assert error < 300 * 2**-24
    # ten steps are better than guessing
    window = next(make._windows(tokenizer))
    loss = float(loaded.loss(Batch(window, window))) / window[:, 1:].numel()
    assert loss < math.log(make.VOCAB_SIZE) - 0.5


def test_quantized_model_predicts_text_it_was_not_trained_on(
    model: Llama, tokenizer: Tokenizer
) -> None:
    # an untrained model's loss is ln(vocab) at best; half of it needs what the corpus teaches
    bound = 0.5 * math.log(tokenizer.vocab_size)
    total, count = 0.0, 0
    for text in islice(documents(SEED + 1), 20):
        ids = torch.tensor([tokenizer.encode(text + EOS, add_special_tokens=True)])
        with torch.no_grad():
            total += model.loss(Batch(ids, ids)).item()
        count += ids.shape[1] - 1
    assert total / count < bound
