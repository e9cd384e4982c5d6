"""A run's kernels, compiled by processes beside the loading of its model.

A kernel takes a third of a second to compile, and a run launches fifty of them: one behind the
other they would take longer than most checkpoints take to load. Half of Triton's compiler is
Python, so threads would take turns.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from time import monotonic

import torch

from foreign.guest import end_with_parent
from kernels.ahead import compile_share
from kernels.device import Properties

MAX_PROCESSES = 8
# as long as all kernels take on one core; a process that hangs must not hold the run up
MAX_SECONDS = 30.0


@contextmanager
def compiling_beside(walk: Callable[[], object], gpu: Properties) -> Iterator[None]:
    """Compile what a walk on the meta device launches, while the body runs.

    The end of the body waits until all is compiled. What a process could not compile, the launch on
    the GPU compiles, and raises what that raises.
    """
    num_shares = min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
    # a forked process has the model's sizes already, and imports nothing
    fork = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = []
    try:
        for number in range(num_shares):
            share = (walk, gpu, number, num_shares)
            process = fork.Process(target=_compile, args=share, daemon=True)
            try:
                process.start()
            except OSError:
                # the machine has no room for more processes
                break
            processes.append(process)
        yield
        end = monotonic() + MAX_SECONDS
        for process in processes:
            process.join(max(0.0, end - monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.join()


def _compile(walk: Callable[[], object], gpu: Properties, number: int, num_shares: int) -> None:
    end_with_parent()
    # the threads that torch computes with are not in this process: it would wait for them for ever
    torch.set_num_threads(1)
    # Ctrl-C is for the run, and errors are for the launch that meets them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    compile_share(walk, gpu, number, num_shares)
