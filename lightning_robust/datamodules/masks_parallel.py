"""A loop over several processes that keeps the order, few tasks in memory, and the user informed."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Task = TypeVar("Task")
Result = TypeVar("Result")


def parallel_map(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    *,
    description: str,
    total: int,
    size: Callable[[Result], int] = lambda result: 1,
) -> Iterator[Result]:
    """Yield ``function(task)`` in the order of the tasks, with a progress bar where the output is a terminal.

    At most two tasks per process are taken at a time, so that memory does not grow with their number.

    Args:
        function: A function of a module, which other processes can import.
        tasks: What it is called with.
        workers: Processes; up to 1: this one.
        description: What the bar says.
        total: What the bar counts to.
        size: How far a result moves the bar.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task(description, total=total)
        for result in map(function, tasks) if workers <= 1 else _pooled(function, tasks, workers):
            bar.advance(shown, size(result))
            yield result


def _pooled(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    # workers touch NumPy and Pillow alone: a fork is safe, and starts at once, where it exists
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    running: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method)) as pool:
        try:
            for task in tasks:
                running.append(pool.submit(function, task))
                if len(running) >= 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
