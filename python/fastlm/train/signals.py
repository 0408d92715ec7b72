"""SIGINT and SIGTERM while a run trains: the first asks it to stop, the second ends the process at once.

Python runs a signal's handler in the main thread and between bytecodes, and one native call of a large step can take
minutes. What tells a second signal from the first must not wait for it: the C handler writes each signal's number into a
pipe (signal.set_wakeup_fd), and a thread reads that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from fastlm.train.callbacks import warn

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def heard(ask: Callable[[str], None]) -> Iterator[None]:
    """While this is open a first signal calls `ask("signal NAME")`, and a second one ends the process with 128 + its number.

    Both may call `ask`, the handler and the thread: the handler is what a signal between two lines of the main thread has
    run before the second line. Outside the main thread signals are someone else's, and nothing is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def listen() -> None:
        first = True
        while numbers := os.read(source, 1):
            if numbers[0] not in STOPPING:
                continue
            if not first:
                os._exit(128 + numbers[0])
            first = False
            name = signal.Signals(numbers[0]).name
            ask(f"signal {name}")
            warn(f"{name}: saving after this step; once more to exit at once")

    source, sink = os.pipe()
    os.set_blocking(sink, False)  # what the C handler writes to must not block
    thread = threading.Thread(target=listen, daemon=True, name="fastlm-signals")
    thread.start()
    before = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    old = {s: signal.signal(s, lambda number, frame: ask(f"signal {signal.Signals(number).name}")) for s in STOPPING}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(sink)  # the thread reads to the end, and ends
        thread.join()
        os.close(source)
