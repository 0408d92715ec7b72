"""Swapped models under DDP and FSDP2, in two real processes: the masks and results of one process over the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from paths import python_path
from ports import free_port

SCRIPT = """
import os, sys, copy, torch, torch.distributed as dist
from torch import nn
sys.path[:0] = sys.argv[1].split(os.pathsep)
import fastlm
from test_swap_blocks import PreNorm, C, L

mode, order = sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = nn.Sequential(PreNorm(), PreNorm(), nn.LayerNorm(C))
x = torch.randn(4, L, C)
whole = copy.deepcopy(model)
fastlm.swap(whole)
fastlm.rng.set(whole, 3, 4, [0, 1, 2, 3])
expected = whole(x)
expected.square().mean().backward()

if order == "swap first":
    fastlm.swap(model)
if mode == "ddp":
    wrapped = nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.fsdp import fully_shard
    for block in model[:2]:
        fully_shard(block)
    fully_shard(model)
    wrapped = model
if order == "swap last":
    fastlm.swap(model)
ids = [rank, rank + 2]
for _ in range(2):
    wrapped.zero_grad()
    fastlm.rng.set(wrapped, 3, 4, ids)
    y = wrapped(x[ids])
    torch.testing.assert_close(y, expected[ids].detach())
    y.square().mean().backward()
for (name, p), q in zip(model.named_parameters(), whole.parameters()):
    grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    torch.testing.assert_close(grad, q.grad, msg=lambda m: name + m)
fastlm.unswap(model)
assert all("fastlm" not in type(m).__module__ for m in model.modules())
wrapped(x[ids]).sum().backward()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads may abort an interpreter that is taken apart while they give back tensors (PyTorch #179291)
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ["swap first", "swap last"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_draw_the_masks_of_one(mode, order, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    port = str(free_port())
    processes = []
    for rank in range(2):
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(script), python_path(), mode, order]
        processes.append(
            subprocess.Popen(
                command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)[-4000:]
