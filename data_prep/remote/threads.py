"""Calls in several threads at once, which an interruption leaves behind instead of waiting for a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
AT_ONCE = 16  # a small file costs a round trip of some 10 ms, in which nothing else is to be done
LEAVE_S = 1.0  # what is left to calls when they are given up


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], *, stop: Event, count: int = AT_ONCE
) -> Generator[Result, None, None]:
    """Yield function(item) of each item in the order in which they end; raise the first error.

    stop: set once no result is wanted any more, for functions that take long to look at. The threads are daemons: a
    call that waits for a server cannot be ended, and would keep an interrupted process from its end.
    """
    todo, turn = iter(items), Lock()
    ended: SimpleQueue[Future[Result] | None] = SimpleQueue()

    def work() -> None:
        while not stop.is_set():
            with turn:
                item = next(todo, None)
            if item is None:
                break
            done: Future[Result] = Future()
            try:
                done.set_result(function(item))
            except BaseException as error:  # noqa: BLE001 - it is raised where the results are read
                done.set_exception(error)
            ended.put(done)
        ended.put(None)

    threads = [Thread(target=work, name="fetch", daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        running = count
        while running:
            done = ended.get()
            if done is None:
                running -= 1
            else:
                yield done.result()
    finally:
        stop.set()
        until = time.monotonic() + LEAVE_S
        for thread in threads:
            thread.join(max(until - time.monotonic(), 0.0))
