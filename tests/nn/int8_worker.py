"""One of two processes of test_nn_int8_distributed.py: int8 layers under DDP and FSDP2, held to one process alone.

argv: the paths, what is trained ("training": float weights; "adapters": LoRA on a frozen int8 base), "ddp" or "fsdp", and a
folder for checkpoints.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path[:0] = sys.argv[1].split(os.pathsep)
import fastlm  # noqa: E402
from fastlm.models.gpt import GPT, named  # noqa: E402
from fastlm.nn import Int8Linear, Int8TrainingLinear  # noqa: E402
from fastlm.train import lora  # noqa: E402

what, mode, folder = sys.argv[2:5]
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
STEPS, CUT = 4, 2


def build() -> GPT:
    """The same model on each rank, as it is before it is shared out."""
    torch.manual_seed(0)
    model = GPT(named("nano", "llama", layers=2, width=36, heads=2, hidden=50, context=16, vocab=64))
    if what == "training":
        fastlm.swap(model, int8="training", only_faster=False)
        return model
    fastlm.swap(model, int8="dynamic", only_faster=False)
    for path in lora.apply(model, 3, 6.0, ["qkv", "down"]):  # three rows of A on two ranks: an uneven shard
        nn.init.normal_(model.get_submodule(path).lora_b, std=0.1)
    return model


def wrap(model: GPT) -> nn.Module:
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.9)


def batch(step: int) -> torch.Tensor:
    return torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, mine: slice) -> list[float]:
    losses = []
    for step in steps:
        tokens = batch(step)[mine]
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        whole_loss = loss.detach().clone()
        if mine != slice(None):
            dist.all_reduce(whole_loss)
            losses[-1] = whole_loss / 2  # the mean over two ranks
    return [float(loss) for loss in losses]


def full(p: torch.Tensor) -> torch.Tensor:
    return p.full_tensor() if isinstance(p, DTensor) else p


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in model.named_buffers()}


alone = build()
held = buffers(alone)
expected = train(alone, optimizer_of(alone), range(STEPS), slice(None))

model = build()
layers = {n: m for n, m in model.named_modules() if isinstance(m, (Int8Linear, Int8TrainingLinear))}
assert len(layers) == 2 * 4, layers.keys()
shapes = {tuple(m.weight.shape) for m in layers.values()}
wrapped = wrap(model)
optimizer = optimizer_of(wrapped)

# float weights lie in shards, and what is quantised is the gathered whole
seen = []
real = fastlm.ops.quantize_int8


def watched(x: torch.Tensor, **options: object) -> object:
    seen.append((type(x) in (torch.Tensor, nn.Parameter), tuple(x.shape)))
    return real(x, **options)


def sharded() -> bool:
    return all(
        isinstance(m.weight, DTensor) and m.weight.to_local().shape[0] < m.weight.shape[0] for m in layers.values()
    )


fastlm.ops.quantize_int8 = watched
if what == "training" and mode == "fsdp":
    assert sharded()
found = train(wrapped, optimizer, range(1), slice(2 * rank, 2 * rank + 2))
fastlm.ops.quantize_int8 = real
assert all(plain for plain, _ in seen)
assert (shapes <= {shape for _, shape in seen}) == (what == "training")
if what == "training" and mode == "fsdp":
    assert sharded()  # again, after a step

# the losses and weights of one process, and a base that no step changes
found += train(wrapped, optimizer, range(1, CUT), slice(2 * rank, 2 * rank + 2))
states = dict(zip(("model", "optimizer"), get_state_dict(wrapped, optimizer)))
dcp.save(states, checkpoint_id=folder)
found += train(wrapped, optimizer, range(CUT, STEPS), slice(2 * rank, 2 * rank + 2))
assert all(abs(a / b - 1) < 1e-4 for a, b in zip(found, expected)), (found, expected)
start = dict(build().named_parameters())
for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
    moved = (q.detach() - start[name].detach()).abs().max()
    assert (moved > 0) == q.requires_grad, name
    # an activation that rounds to another int8 moves a gradient by far less
    assert (full(p.detach()) - q.detach()).abs().max() <= 0.01 * moved, name
assert all(torch.equal(b, held[n]) for n, b in model.named_buffers())

# another pair of processes would go on to the same bits
torch.manual_seed(99)
again = build()
for m in again.modules():
    if isinstance(m, Int8Linear):
        m.weight.zero_()  # what is not read shows
resumed = wrap(again)
other = optimizer_of(resumed)
states = dict(zip(("model", "optimizer"), get_state_dict(resumed, other)))
dcp.load(states, checkpoint_id=folder)
set_state_dict(resumed, other, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
assert train(resumed, other, range(CUT, STEPS), slice(2 * rank, 2 * rank + 2)) == found[CUT:]
for (name, p), q in zip(again.named_parameters(), model.parameters(), strict=True):
    assert torch.equal(full(p), full(q)), name
assert all(torch.equal(b, held[n]) for n, b in again.named_buffers())
dist.destroy_process_group()
sys.stdout.flush()
os._exit(
    0
)  # gloo's threads may abort an interpreter that is taken apart while they give back tensors (PyTorch #179291)
