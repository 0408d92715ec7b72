"""datatrove's local executor with its log in files alone, and Ctrl-C left to the process that began."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import multiprocess
from datatrove.executor import base
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.utils import logging as theirs


def _to_file(folder: Any, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
    theirs.logger.remove()
    logfile = folder.open(f"logs/task_{rank:05d}.log", "w")
    theirs.logger.add(logfile, level="DEBUG", colorize=False, catch=False)
    return logfile


_watching = 0  # the process whose thread `_leave_with_parent` runs


def _leave_with_parent() -> None:
    """A task of a killed run ends with it: the run that goes on writes the same files."""
    multiprocess.parent_process().join()
    os._exit(1)


def begin_beneath() -> None:
    """In a process of a task: Ctrl-C is left to the process that began, and its end is watched for, once a process."""
    global _watching
    if multiprocess.parent_process() is None or _watching == os.getpid():
        return
    _watching = os.getpid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True, name="leave with parent").start()


def _closed(logfile: Any) -> None:
    theirs.logger.remove()
    logfile.close()


def preload(blocks: list[Any]) -> None:
    """Has the process from which workers are forked import what they run, once: they share its memory."""
    multiprocess.set_forkserver_preload(sorted({type(block).__module__ for block in blocks} | {__name__}))


class Quiet(LocalPipelineExecutor):
    """Runs tasks in processes of this machine; the terminal is the caller's."""

    def run(self) -> Any:
        theirs.logger.remove()
        return super().run()

    def _launch_run_for_rank(self, *args: Any, **named: Any) -> Any:
        theirs.logger.remove()
        base.add_task_logger, base.close_task_logger = _to_file, _closed
        begin_beneath()
        return super()._launch_run_for_rank(*args, **named)
