"""generation/generator.py, and the whole model on stories260K, a real checkpoint."""

from pathlib import Path

import pytest
import tokenizers
import torch
from support.llama_peers import CHUNK_LENGTH, CPU, NUM_CHUNKS, stories_peer, tiny_peer
from support.tiny_llama import VARIANTS, write_variant

from checkpoint.loading import load_model
from checkpoint.opening import open_checkpoint
from generation.generator import Generator, generate_greedy
from generation.prompt_pass import PromptPass
from generation.sampling import Sampling
from llama.cache import KeyValueCache
from llama.model import PROJECTIONS, Llama
from lora.config import LoRAConfig
from nf4.weight import Quantization
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


PROMPTS = [[1, 5, 9], [4], [7, 7, 30, 2, 11], [8, 1], [40, 41, 42, 43]]


DRAWN = Sampling(0.8, 20, 0.9, 1.1, 3)


def greedy(num_sequences: int, model: Llama, max_new_tokens: int = 20) -> Generator:
    capacity = max(map(len, PROMPTS)) + max_new_tokens
    return Generator(model, Sampling(), capacity, num_sequences)


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 8])
# of phi3 the rotary frequencies change at 16 tokens, for each text on its own
@pytest.mark.parametrize("variant", ["grouped-query", "phi3", "gemma2"])
def test_texts_beside_each_other_are_those_alone(
    tmp_path: Path, variant: str, num_sequences: int
) -> None:
    model = load_model(open_checkpoint(write_variant(tmp_path, variant)), CPU, torch.float32, None)
    alone = [generate_greedy(model, prompt, 20, ()) for prompt in PROMPTS]
    # some end early, so that slots change hands
    stops = {alone[0][3], alone[2][10]}
    expected = [
        ids[: next((i for i, token in enumerate(ids) if token in stops), 20)] for ids in alone
    ]
    assert len({len(ids) for ids in expected}) > 1
    generator = greedy(num_sequences, model)
    for _ in range(2):
        found = dict(generator.complete(PROMPTS, 20, stops))
        assert [found[number] for number in range(len(PROMPTS))] == expected


def test_texts_come_as_they_end(tiny: Llama) -> None:
    stop = generate_greedy(tiny, PROMPTS[1], 20, ())[2]
    others = [p for p in PROMPTS if stop not in generate_greedy(tiny, p, 20, ())]
    assert others
    numbers = [n for n, _ in greedy(2, tiny).complete([others[0], PROMPTS[1]], 20, {stop})]
    assert numbers == [1, 0]


def test_drawn_texts_depend_on_seed_and_number_alone(tiny: Llama) -> None:
    def drawn(num_sequences: int, seed: int) -> dict[int, list[int]]:
        generator = Generator(tiny, Sampling(temperature=1.0, seed=seed), 40, num_sequences)
        return dict(generator.complete([[1, 2]] * 4, 20, ()))

    alone = drawn(1, 0)
    assert alone == drawn(3, 0)
    assert len({tuple(ids) for ids in alone.values()}) == 4
    assert alone != drawn(1, 1)


def test_a_stream_that_is_closed_leaves_its_slot(tiny: Llama) -> None:
    generator = greedy(1, tiny)
    expected = generate_greedy(tiny, PROMPTS[0], 20, ())
    for _ in range(2):
        stream = generator.stream(PROMPTS[0], 20, ())
        assert [next(stream), next(stream)] == expected[:2]
        stream.close()
    assert list(generator.stream(PROMPTS[0], 20, ())) == expected


def test_a_second_call_is_refused_while_the_first_is_half_read(tiny: Llama) -> None:
    # with a slot to spare as well
    generator = greedy(2, tiny)
    stream = generator.stream(PROMPTS[0], 20, ())
    found = [next(stream)]
    with pytest.raises(ValueError, match=r"of one call at a time: .* is half-read"):
        list(generator.stream(PROMPTS[1], 20, ()))
    assert found + list(stream) == generate_greedy(tiny, PROMPTS[0], 20, ())
    # and between two texts, where no slot is taken
    generator = greedy(1, tiny)
    texts = generator.complete(PROMPTS, 3, ())
    found = [next(texts)]
    with pytest.raises(ValueError, match=r"of one call at a time: .* is half-read"):
        list(generator.stream(PROMPTS[1], 20, ()))
    assert [ids for _, ids in found + list(texts)] == [
        generate_greedy(tiny, prompt, 3, ()) for prompt in PROMPTS
    ]


def test_a_prompt_that_fails_leaves_all_slots(tiny: Llama) -> None:
    generator = greedy(2, tiny)
    with pytest.raises(ValueError, match="must have at most 25 tokens: got 6 and 20"):
        list(generator.complete([[1], [2], [3] * 6], 20, ()))
    with pytest.raises(ValueError, match="at least one token: got none"):
        list(generator.complete([[1], []], 20, ()))
    assert len(dict(generator.complete(PROMPTS, 20, ()))) == len(PROMPTS)


def test_no_tokens_are_asked_for_beyond_the_capacity(tiny: Llama) -> None:
    generator = Generator(tiny, Sampling(), 8, 2)
    # one slot's text ends where the cache does, while the other's goes on
    found = dict(generator.complete([[1] * 4, [2] * 3, [3] * 4], 4, ()))
    assert [len(ids) for ids in found.values()] == [4, 4, 4]
    for number, prompt in enumerate(([1] * 4, [2] * 3, [3] * 4)):
        assert found[number] == generate_greedy(tiny, prompt, 4, ())


# of phi3 sequences of more than 16 tokens are long ones, which padding must not make of others
@pytest.mark.parametrize("variant", ["grouped-query", "mistral", "phi3"])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 63, 64, 65])
def test_a_padded_prompt_is_the_prompt(tmp_path: Path, variant: str, num_tokens: int) -> None:
    model = load_model(open_checkpoint(write_variant(tmp_path, variant)), CPU, torch.float32, None)
    prompt = [1 + i % 50 for i in range(num_tokens)]
    found = []
    for is_padded in (False, True):
        # room for fewer tokens than the padded ones
        cache = KeyValueCache(model.config, 2, num_tokens + 3, torch.float32, CPU)
        passes = PromptPass(model, cache, captures=False)
        passes._captures = is_padded
        hidden = passes(prompt, 1)
        parts = (*cache.keys, *cache.values)
        found.append([hidden, *(part[1, :, :num_tokens] for part in parts)])
    for plain, padded in zip(*found, strict=True):
        assert plain.isfinite().all()
        bound = 100 * torch.finfo(torch.float32).eps * plain.abs().max()
        assert (plain - padded).abs().max() <= bound


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.8, 20, 0.9, 1.1, 3)], ids=["", "drawn"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gpu_captured_tokens_are_those_launched(
    tmp_path: Path, variant: str, sampling: Sampling
) -> None:
    device = torch.device("cuda")
    checkpoint = open_checkpoint(write_variant(tmp_path, variant))
    model = load_model(checkpoint, device, torch.bfloat16, Quantization(64, True))
    found = []
    for captures in (False, True):
        generator = Generator(model, sampling, 40, 3, captures)
        # launched, captured and replayed
        for _ in range(3):
            found.append(dict(generator.complete(PROMPTS, 20, ())))
    assert all(texts == found[0] for texts in found)
    assert all(len(ids) == 20 for ids in found[0].values())


@pytest.mark.gpu
def test_gpu_prompts_of_a_length_that_comes_again_are_captured(tmp_path: Path) -> None:
    device = torch.device("cuda")
    checkpoint = open_checkpoint(write_variant(tmp_path, "grouped-query"))
    model = load_model(checkpoint, device, torch.bfloat16, Quantization(64, True))
    model.make_tables()
    # of the second length the last rows of the padding have no room in the cache
    for num_tokens, num_others, capacity in ((5, 64, 70), (100, 70, 110)):
        cache = KeyValueCache(model.config, 2, capacity, torch.bfloat16, device)
        prompts = [[1 + i % 50 for i in range(n)] for n in (num_tokens, num_others, num_tokens)]
        passes = PromptPass(model, cache, captures=True)
        found = []
        for turn, prompt in enumerate(prompts):
            hidden = passes(prompt, turn % 2)
            rows = cache.keys[-1][turn % 2, :, : len(prompt)]
            found.append((hidden.clone(), rows.clone()))
        assert len(passes._captured) == 1
        # launched and replayed
        for first, third in zip(found[0], found[2], strict=True):
            assert first.isfinite().all()
            assert torch.equal(first, third)
