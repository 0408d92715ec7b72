"""Int8 layers in two processes, under DDP and FSDP2: the losses of one process, what is sharded, and resuming to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import python_path
from ports import free_port

WORKER = str(Path(__file__).with_name("int8_worker.py"))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["training", "adapters"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does_and_go_on_to_the_bit(what: str, mode: str, tmp_path: Path) -> None:
    port, processes = str(free_port()), []
    for rank in range(2):
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, WORKER, python_path(), what, mode, str(tmp_path / "checkpoint")]
        processes.append(
            subprocess.Popen(
                command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        outputs = [p.communicate(timeout=300)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(p.returncode == 0 for p in processes), "\n".join(outputs)
