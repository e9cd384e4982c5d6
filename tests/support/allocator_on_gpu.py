"""Takes and gives back random blocks on a GPU; prints what torch and what the replay reserve."""

import json
import random

import torch
from torch import Tensor

from step.allocations import Event
from step.caching_allocator import CachingAllocator

MIB = 1 << 20
UNITS = (512, 4096, MIB // 3, MIB, 3 * MIB, 30 * MIB)


def main() -> None:
    stream = torch.cuda.Stream()
    for seed in range(8):
        generator = random.Random(seed)
        pool, replay = torch.cuda.MemPool(), CachingAllocator()
        held: dict[int, Tensor] = {}
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool):
            for number in range(400):
                size = generator.choice(UNITS) * generator.randint(1, 3) - generator.randrange(512)
                held[number] = torch.empty(size, dtype=torch.uint8, device="cuda")
                replay.run([Event(number, size, "pool")])
                for _ in range(generator.randint(0, 3) if len(held) > 20 else 0):
                    gone = generator.choice(list(held))
                    del held[gone]
                    replay.run([Event(gone, 0, "pool")])
                print(json.dumps([torch.cuda.memory_reserved() - before, replay.reserved]))
            held.clear()
        del pool


if __name__ == "__main__":
    main()
