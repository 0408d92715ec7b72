"""A map over spawned processes that keeps order and memory: what prepares large corpora.

Spawned, not forked: a forked child hangs once its parent has run a parallel region.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from fastlm.data.errors import InputError

_shared: tuple[Any, ...] = ()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _begin(*shared: Any) -> None:
    global _shared
    _shared = shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core, not one thread a core in each
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _call(function: Callable[..., Any], item: Any) -> Any:
    return function(item, *_shared)


def ordered(
    function: Callable[..., Any], items: Iterable[tuple[Any, int]], workers: int, *shared: Any
) -> Iterator[tuple[Any, int]]:
    """(function(item, *shared), tag) of each (item, tag), in order; in `workers` processes when more than 1.

    At most workers + 2 items are under way, so memory does not grow with their number. `function` is one of a module,
    and `shared` is sent to each process once.
    """
    if workers <= 1:
        for item, tag in items:
            yield function(item, *shared), tag
        return
    context = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=shared)
    except OSError as error:  # its locks lie in shared memory
        raise InputError(
            f"the processes that prepare the corpus cannot be started: {error.strerror or error} (shared memory, /dev/shm, "
            f"which may be full or read-only); --workers 1 prepares without processes"
        ) from error
    waiting: deque[tuple[Future[Any], int]] = deque()
    try:
        for item, tag in items:
            waiting.append((pool.submit(_call, function, item), tag))
            if len(waiting) >= workers + 2:
                done, tag = waiting.popleft()
                yield done.result(), tag
        while waiting:
            done, tag = waiting.popleft()
            yield done.result(), tag
    except BrokenProcessPool as error:
        raise InputError(
            "a process that prepares the corpus died (out of memory, or started by a script that does not call fastlm "
            'under `if __name__ == "__main__":`); --workers 1 prepares without processes'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
