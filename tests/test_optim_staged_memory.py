"""optim/staged_memory.py: its parts are the whole, and they come and go in time."""

from dataclasses import replace

import pytest
import torch
from support.adamw_cases import AdamWCase, held_tensors, random_arenas, set_gradients
from support.equality import assert_equal
from support.lagging_streams import lag

from kernels.adamw import adamw_reference
from kernels.adamw_arenas import MOMENT_BLOCK, TILE_BLOCKS, Moments
from optim import staged_memory
from optim.arena import Layout
from optim.staged_memory import StagedMemory, _laid_out, cut, moments_of, spans


@pytest.mark.parametrize("size", [TILE_BLOCKS, 3 * TILE_BLOCKS, 1000 * TILE_BLOCKS])
def test_spans_cover_the_arena_and_keep_to_one_region(size: int) -> None:
    num_8bit, num_blocks = 7 * TILE_BLOCKS, 12 * TILE_BLOCKS
    found = list(spans(num_8bit, num_blocks, size))
    assert [first for first, _ in found] == [0, *(last for _, last in found[:-1])]
    assert found[-1][1] == num_blocks
    for first, last in found:
        assert 0 < last - first <= size
        assert (last <= num_8bit) == (first < num_8bit)
    assert list(spans(0, 0, size)) == []


def test_steps_over_the_parts_are_a_step_over_the_whole() -> None:
    case = AdamWCase(3, 2, max_norm=0.0, num_groups=3)
    whole, parted = random_arenas(case), random_arenas(case)
    for step in range(2):
        for arenas in (whole, parted):
            set_gradients(arenas, case, step)
        adamw_reference(whole, 1e-2, 0.0, torch.tensor(1.0))
        steps = parted.num_updates.clone()
        num_8bit, num_blocks = 3 * TILE_BLOCKS, 5 * TILE_BLOCKS
        slots = torch.empty(2, 2 * TILE_BLOCKS * MOMENT_BLOCK * 8, dtype=torch.uint8)
        for index, span in enumerate(spans(num_8bit, num_blocks, 2 * TILE_BLOCKS)):
            parted.num_updates.copy_(steps)
            home = moments_of(parted.moments, *span)
            away = _laid_out(home, slots[index % 2])
            copy(home, away)
            adamw_reference(cut(parted, *span, away), 1e-2, 0.0, torch.tensor(1.0))
            copy(away, home)
        for name, tensor in held_tensors(whole).items():
            assert_equal(held_tensors(parted)[name], tensor, f"step {step}: {name}")


def copy(source: Moments, target: Moments) -> None:
    for name, tensor in vars(source).items():
        getattr(target, name).copy_(tensor)


@pytest.mark.parametrize("slow", ["copies", "kernels"])
def test_parts_come_and_go_in_time_whatever_is_slow(
    slow: str, device_with_streams: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged_memory, "PART_BLOCKS", TILE_BLOCKS)
    size = 4 * TILE_BLOCKS * MOMENT_BLOCK
    layout = Layout({"lora_A": torch.Size((size,))}, is_8bit=False)
    memory = StagedMemory(layout.moment_bytes(), device_with_streams)
    moments = layout.carve(memory.buffer)
    arenas = replace(random_arenas(AdamWCase(0, 4)), moments=moments)
    arenas = replace(arenas, parameters=torch.zeros(size, device=device_with_streams))
    copy_in_time = memory._copy

    def copy_late(source: Moments, target: Moments) -> torch.cuda.Event:
        lag(memory._copies)
        return copy_in_time(source, target)

    # at first nothing is slow: kernels are loaded, which may wait for the GPU
    for turn, lagging in enumerate(("nothing", slow)):
        if lagging == "copies":
            monkeypatch.setattr(memory, "_copy", copy_late)
        before = torch.arange(size, dtype=torch.float32) + turn * size
        moments.exp_avg.copy_(before)
        torch.cuda.synchronize()
        for piece in memory.pieces(arenas):
            if lagging == "kernels":
                lag(torch.cuda.current_stream())
            # stands for the kernel
            piece.parameters.copy_(piece.moments.exp_avg)
            piece.moments.exp_avg.add_(1)
        memory.settled()
        assert_equal(moments.exp_avg, before + 1, f"{lagging} slow: moments")
        assert_equal(arenas.parameters.cpu(), before, f"{lagging} slow: parameters")
