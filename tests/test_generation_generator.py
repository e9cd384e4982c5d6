"""generation/generator.py, and the whole model on stories260K, a real checkpoint."""

from pathlib import Path

import pytest
import tokenizers
import torch
from support.llama_peers import CHUNK_LENGTH, CPU, NUM_CHUNKS, stories_peer, tiny_peer
from support.tiny_llama import VARIANTS, write_variant

from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from generation.generator import generate_greedy
from llama.model import PROJECTIONS, Llama
from lora.config import LoRAConfig
from rows.batch import Batch

# what the issue promises of float32 logits and losses of order one
PROMISED = 1e-4


@pytest.fixture
def stories(assets: Path) -> Llama:
    return load_model(open_checkpoint(assets / "stories260K"), CPU, torch.float32, None)


@pytest.fixture
def tiny(tmp_path: Path) -> Llama:
    return load_model(
        open_checkpoint(write_variant(tmp_path, "grouped-query")), CPU, torch.float32, None
    )


def test_greedy_text_equals_the_published_one(assets: Path, stories: Llama) -> None:
    folder = assets / "stories260K"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    new_ids = generate_greedy(stories, [1], max_new_tokens=256, stop_ids=())
    assert len(new_ids) == 256
    published = (folder / "published_greedy.txt").read_text(encoding="utf-8")
    assert tokenizer.decode(new_ids) == published


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_transformers(
    tmp_path_factory: pytest.TempPathFactory, variant: str
) -> None:
    peer = tiny_peer(tmp_path_factory, variant)
    model = load_model(open_checkpoint(peer.checkpoint), CPU, torch.float32, None)
    prompt, expected = peer.inputs["input_ids"][0, :12].tolist(), peer.outputs["greedy"][0]
    assert generate_greedy(model, prompt, 24, ()) == expected[12:].tolist()


def test_logits_of_real_text_equal_transformers(
    tmp_path_factory: pytest.TempPathFactory, assets: Path, stories: Llama
) -> None:
    peer = stories_peer(tmp_path_factory, assets)
    expected = peer.outputs["logits"]
    actual = stories.logits(peer.inputs["input_ids"])
    assert actual.shape == expected.shape == (4, CHUNK_LENGTH, 512)
    assert actual.dtype == expected.dtype == torch.float32
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() <= PROMISED


@torch.no_grad()
def test_mean_loss_of_real_text_equals_transformers(
    tmp_path_factory: pytest.TempPathFactory, assets: Path, stories: Llama
) -> None:
    peer = stories_peer(tmp_path_factory, assets)
    chunks = peer.inputs["chunks"]
    assert chunks.shape == (NUM_CHUNKS, CHUNK_LENGTH)
    total = sum(float(stories.loss(Batch(part, part))) for part in chunks.split(20))
    actual = total / (NUM_CHUNKS * (CHUNK_LENGTH - 1))
    assert abs(actual - peer.facts["mean_loss"]) <= PROMISED
    # a trained model on its own text: far below the log(512) = 6.2 of guessing
    assert actual < 2


def test_each_token_is_the_most_probable_after_those_before(tiny: Llama) -> None:
    prompt = [1, 17, 40]
    new_ids = generate_greedy(tiny, prompt, max_new_tokens=12, stop_ids=())
    logits = tiny.logits(torch.tensor([prompt + new_ids]))[0]
    assert new_ids == logits[len(prompt) - 1 : -1].argmax(dim=1).tolist()


def test_generation_ends_before_a_stop_token(tiny: Llama) -> None:
    free = generate_greedy(tiny, [1], max_new_tokens=12, stop_ids=())
    stop = free[7]
    stopped = generate_greedy(tiny, [1], max_new_tokens=12, stop_ids=(stop,))
    assert stopped == free[: free.index(stop)]
    assert generate_greedy(tiny, [1], max_new_tokens=0, stop_ids=()) == []


def test_generation_has_no_dropout_and_leaves_the_mode(tiny: Llama) -> None:
    tiny.attach_lora(LoRAConfig(4, 64, 0.9, PROJECTIONS), seed=0)
    for tensor in tiny.adapter_tensors().values():
        tensor.normal_()
    expected = generate_greedy(tiny, [1], max_new_tokens=12, stop_ids=())
    assert not tiny.training
    tiny.train()
    assert generate_greedy(tiny, [1], max_new_tokens=12, stop_ids=()) == expected
    assert tiny.training


def test_an_empty_prompt_is_refused(tiny: Llama) -> None:
    with pytest.raises(ValueError, match="a prompt must hold at least one token: got none"):
        generate_greedy(tiny, [], max_new_tokens=1, stop_ids=())
