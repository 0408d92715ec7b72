"""datatrove's local executor with its log in files alone, and Ctrl-C left to the process that began."""

from __future__ import annotations

import signal
from typing import Any

import multiprocess
from datatrove.executor import base
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.utils import logging as theirs


def _to_file(folder: Any, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
    theirs.logger.remove()
    logfile = folder.open(f"logs/task_{rank:05d}.log", "w")
    theirs.logger.add(logfile, level="DEBUG", colorize=False)
    return logfile


def _closed(logfile: Any) -> None:
    theirs.logger.remove()
    logfile.close()


class Quiet(LocalPipelineExecutor):
    """Runs tasks in processes of this machine; the terminal is the caller's."""

    def run(self) -> Any:
        theirs.logger.remove()
        return super().run()

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        base.add_task_logger, base.close_task_logger = _to_file, _closed
        if multiprocess.parent_process() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return super()._run_for_rank(rank, local_rank, node_rank)
