"""SIGINT, SIGTERM and SIGHUP while a run trains: the first asks it to stop, the second ends the process at once.

Python runs a signal's handler in the main thread and between bytecodes, and one native call of a large step can take
minutes. What tells a second signal from the first must not wait for it: the C handler writes each signal's number into a
pipe (signal.set_wakeup_fd), and a thread reads that.

One wish to stop may come as several signals: slurm tells every process and torchrun tells its own again; Linux sends a
rank the signal for its launcher's death (launch.py) for every thread of it that takes the dying one's children over. What
comes within ECHO seconds of the first is its echo, and the user is told of the second one's meaning when they are over.

SIGHUP says that the terminal is closed. Nobody sends it twice on purpose (a shell and the kernel each may send it, at times
of their own), so it never ends the process at once. A run that was started to ignore it (nohup) goes on ignoring it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator

from fastlm.console import warn

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
HANGUP = {s for s in STOPPING if s.name == "SIGHUP"}
ECHO = 0.5  # seconds


def ours() -> tuple[signal.Signals, ...]:
    """Those of STOPPING that this process heeds: all, but for a SIGHUP that it was started to ignore."""
    return tuple(s for s in STOPPING if s not in HANGUP or signal.getsignal(s) is not signal.SIG_IGN)


@contextlib.contextmanager
def heard(ask: Callable[[str], None]) -> Iterator[None]:
    """While this is open a first signal calls `ask("signal NAME")`, and a second one, ECHO seconds later or more, ends the
    process with 128 + its number.

    Both may call `ask`, the handler and the thread: the handler is what a signal between two lines of the main thread has
    run before the second line. Outside the main thread signals are someone else's, and nothing is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def next_signal(of: Collection[int]) -> int:
        """The number of the next of such signals; 0 at the end."""
        while numbers := os.read(source, 1):
            if numbers[0] in of:
                return numbers[0]
        return 0

    def listen() -> None:
        if not (number := next_signal(heeded)):
            return
        name = signal.Signals(number).name
        ask(f"signal {name}")
        ready, end = select.poll(), time.monotonic() + ECHO
        ready.register(source, select.POLLIN)
        while ready.poll(max(end - time.monotonic(), 0.0) * 1000):
            if not next_signal(heeded):
                return
        warn(f"{name}: saving after this step; once more to exit at once")
        if number := next_signal(set(heeded) - HANGUP):
            os._exit(128 + number)

    heeded = ours()
    source, sink = os.pipe()
    os.set_blocking(sink, False)  # what the C handler writes to must not block
    thread = threading.Thread(target=listen, daemon=True, name="fastlm-signals")
    thread.start()
    before = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    old = {s: signal.signal(s, lambda number, frame: ask(f"signal {signal.Signals(number).name}")) for s in heeded}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(sink)  # the thread reads to the end, and ends
        thread.join()
        os.close(source)
