"""Runs command lines of fastlm one after the other, each in a process forked from one that has imported all it needs.

python forks.py < requests > answers, a line of JSON each: {"argv", "out", "err"} is answered by {"code", "text", "err"}.
`out` says what stdout is: "pipe" (its text is answered), "closed" (a pipe that nobody reads), "full" (a full disk), "narrow"
(a terminal of 20 columns); `err` the same of stderr ("pipe" or "full").
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import pty
import signal
import struct
import sys
import termios
import threading
from typing import Any, NoReturn

SECONDS = 200


def child(argv: list[str], out: int, err: int) -> NoReturn:
    """fastlm's console script, as a process of its own would run it."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.closerange(3, 256)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    sys.argv = ["fastlm", *argv]
    signal.alarm(SECONDS)
    code = 1
    try:
        from fastlm.cli.main import run

        run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  as the interpreter would
        import traceback

        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            code = 120
            os.write(2, f"Exception ignored: {error}\n".encode()) if stream is sys.stdout else None
    os._exit(code)


def read(source: int, into: list[bytes]) -> None:
    while True:
        try:
            got = os.read(source, 1 << 16)
        except OSError:  # of a terminal whose other end is closed
            return
        if not got:
            return
        into.append(got)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    ends, readers, said = {}, [], {"out": list[bytes](), "err": list[bytes]()}
    for name in ("out", "err"):
        kind = asked.get(name, "pipe")
        if kind == "full":
            ends[name] = os.open("/dev/full", os.O_WRONLY)
            continue
        source, ends[name] = pty.openpty() if kind == "narrow" else os.pipe()
        if kind == "narrow":
            fcntl.ioctl(ends[name], termios.TIOCSWINSZ, struct.pack("HHHH", 24, 20, 0, 0))
        if kind == "closed":
            os.close(source)
            continue
        thread = threading.Thread(target=read, args=(source, said[name]))
        readers.append((thread, source))
    if not (process := os.fork()):
        child(asked["argv"], ends["out"], ends["err"])
    for end in ends.values():
        os.close(end)
    for thread, _ in readers:
        thread.start()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    for thread, source in readers:
        thread.join()
        os.close(source)
    out, err = (b"".join(said[name]).decode("utf-8", "replace") for name in ("out", "err"))
    return {"code": status, "text": out, "err": err}


def main() -> None:
    import torch

    torch.set_num_threads(1)  # a child of a process that has run a parallel region hangs
    from fastlm.cli.main import COMMANDS

    for module, _ in COMMANDS.values():
        importlib.import_module(module)
    for name in ("clean", "augment", "filter", "labels", "pairs", "tasks"):
        importlib.import_module(f"fastlm.cli.{name}")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
