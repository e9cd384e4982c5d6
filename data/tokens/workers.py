"""Tasks done by confined processes, several at once, with their results in the order of the tasks.

A process that exceeds a limit ends, and the whole pool with it (concurrent.futures knows no other
way). The record that it was at is known (data/tokens/confinement.py): where that record may be left
out, the tasks that have no result yet go to new processes without it.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

from data.tokens.confinement import Confinement, TakesTooMuch, end_record
from foreign.guest import end_with_parent

Task = TypeVar("Task")
Result = TypeVar("Result")

# a template that never ends takes all the time that a record may take, for every record
_MOST_LEFT_OUT = 8


def in_turn(
    work: Callable[[Task], Result],
    tasks: Iterator[Task],
    num_processes: int,
    leave_out: Callable[[Task, TakesTooMuch], Task | None],
) -> Iterator[Result]:
    """Let confined processes work on tasks, and yield the results in the tasks' order.

    At no time are more than a few tasks in memory.

    Args:
        work: is forked with each process, and so may hold anything.
        leave_out: is given a task and the error of a record that takes too much; returns the task
            without that record, or None where the record is not in the task, or raises the error.

    Raises:
        ValueError: of the work, of a record that takes too much, or of the tasks once the results
            of those before are out.
        ChildProcessError: a process was killed.
    """
    workers = _Workers(work, num_processes, leave_out)
    fault: ValueError | None = None
    try:
        while fault is None:
            try:
                task = next(tasks)
            except StopIteration:
                break
            except ValueError as error:
                fault = error
            else:
                workers.submit(task)
                if len(workers) > 2 * num_processes:
                    yield workers.next_result()
        while len(workers):
            yield workers.next_result()
    finally:
        workers.stop()
    if fault is not None:
        raise fault


class _Workers(Generic[Task, Result]):
    """Processes, and the tasks that were given to them and whose results are not taken yet."""

    def __init__(
        self,
        work: Callable[[Task], Result],
        num_processes: int,
        leave_out: Callable[[Task, TakesTooMuch], Task | None],
    ) -> None:
        self._work, self._num_processes, self._leave_out = work, num_processes, leave_out
        self._pending: deque[tuple[Task, Future[Result]]] = deque()
        self._num_left_out = 0
        self._start()

    def _start(self) -> None:
        self._confinement = Confinement(self._num_processes)
        self._pool = ProcessPoolExecutor(
            self._num_processes,
            # a forked process has the tokenizer already, and imports nothing
            mp_context=multiprocessing.get_context("fork"),
            initializer=_start_process,
            initargs=(self._work, self._confinement),
        )

    def __len__(self) -> int:
        return len(self._pending)

    def submit(self, task: Task) -> None:
        try:
            future = self._pool.submit(_do, task)
            self._confinement.watch()
        except BrokenProcessPool as error:
            # next_result() starts again
            future = Future[Result]()
            future.set_exception(error)
        self._pending.append((task, future))

    def next_result(self) -> Result:
        """Wait for the result of the task that was given first, and take it."""
        while True:
            try:
                result = self._pending[0][1].result()
            except BrokenProcessPool as error:
                self._start_again(error)
            else:
                self._pending.popleft()
                return result

    def _start_again(self, error: BrokenProcessPool) -> None:
        """Give the tasks without a result to new processes, without the record that ended one."""
        # how a process ended is known once all of them have
        self.stop()
        fault = self._confinement.explain()
        if isinstance(fault, ChildProcessError):
            raise fault from error
        earlier, self._pending = self._pending, deque()
        self._start()
        is_found = False
        for task, future in earlier:
            has_outcome = future.done() and not future.cancelled()
            if has_outcome and not isinstance(future.exception(), BrokenProcessPool):
                self._pending.append((task, future))
                continue
            rest = self._leave_out(task, fault)
            is_found |= rest is not None
            self.submit(task if rest is None else rest)
        if not is_found:
            raise fault from error
        self._num_left_out += 1
        if self._num_left_out > _MOST_LEFT_OUT:
            raise ValueError(
                f"{fault}; {_MOST_LEFT_OUT} such records were left out already: the template or "
                "the tokenizer may never come to an end"
            ) from error

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)


# the work, in a forked process
_work: Callable[[Any], Any]


def _start_process(work: Callable[[Any], Any], confinement: Confinement) -> None:
    global _work
    _work = work
    confinement.enter()
    # Ctrl-C reaches them all; the parent ends this one
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def _do(task: Any) -> Any:
    result = _work(task)
    end_record()
    return result
