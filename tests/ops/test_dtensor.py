"""The ops on DTensors, in two real processes: values, gradients and masks of one process over the whole, and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from paths import python_path

dtensor_worker = str(Path(__file__).with_name("dtensor_worker.py"))


def test_two_ranks_compute_what_one_does(tmp_path):
    command = [sys.executable, dtensor_worker, str(tmp_path / "meeting")]
    out = dict(
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONPATH": python_path()}
    )
    ranks = [subprocess.Popen([*command, str(rank)], **out) for rank in range(2)]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)[-6000:]
        assert all(text.endswith("done\n") for text in said)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_plain_tensors_import_nothing_of_it():
    code = (
        "import sys, torch, fastlm\n"
        "x = torch.ones(2, 8)\n"
        "fastlm.swap(torch.nn.Sequential(torch.nn.LayerNorm(8)))\n"
        "fastlm.ops.norm(x)\n"
        "assert 'torch.distributed.tensor' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
