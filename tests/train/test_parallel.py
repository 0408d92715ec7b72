"""Meshes of real processes: losses, gradients and checkpoints are those of one process, whatever the mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel_worker
import pytest
import torch
from fastlm.data import InputError
from fastlm.models.gpt import GPT, named
from fastlm.train import checkpoint, launch, mesh, parallel, pipeline, stages, tensor_parallel

WORKER = Path(__file__).parent / "parallel_worker.py"
# batch 5 over two ranks: three samples and two, with unequal numbers of targets; micro 1: the second ends with an empty one
UNTIED = {"tied": False, "heads": 4, "kv_heads": 2, "width": 40, "vocab": 65}
# evaluations on the way read the moving average, which no later step may see
CASES: dict[str, dict[str, Any]] = {
    "fused with dropout": {"dropout": 0.2, "kernels": "fused", "ema": 0.9, "eval_every": 1},
    "torch": {"kernels": "torch"},
    "accumulation": {"dropout": 0.2, "kernels": "fused", "micro": 1, "style": "llama", "shape": UNTIED},
    "bfloat16": {"dropout": 0.2, "kernels": "fused", "dtype": "bfloat16"},
    "muon": {"dropout": 0.2, "kernels": "fused", "optimizer": "muon", "style": "llama"},
    "recompute": {
        "dropout": 0.2,
        "recompute": "full",
        "micro": 2,
        "smoothing": 0.1,
        "z_loss": 1e-3,
        "shape": {"vocab": 67},
    },
}
MESHES = ["dp=2", "fsdp=2", "tp=2", "pp=2"]
# two stages a rank of pp=2: blocks 0, 1 and 3 on the first, 2 and 4 on the second; three micro-batches, and five
LONG: dict[str, dict[str, Any]] = {
    "interleaved": {"dropout": 0.2, "micro": 2, "ema": 0.9, "eval_every": 1, "shape": {"layers": 5}},
    "interleaved muon": {
        "dropout": 0.2,
        "micro": 1,
        "optimizer": "muon",
        "style": "llama",
        "recompute": "half",
        "shape": {"layers": 5, **UNTIED},
    },
    "interleaved bfloat16": {"dtype": "bfloat16", "micro": 1, "kernels": "torch", "shape": {"layers": 4}},
}
STAGES = 2


def start(out: Path, label: str, cases: list[dict[str, Any]], processes: int) -> None:
    command = [sys.executable, str(WORKER), str(out), json.dumps(cases), label]
    if processes == 1:
        subprocess.run(command, check=True, timeout=300)
    else:
        assert launch.run(command, processes, 1) == 0


class Outcome:
    def __init__(self, out: Path, label: str, name: str, rank: int = 0) -> None:
        result = json.loads((out / f"{label}.json").read_text())[f"{label} {name}"]
        self.losses, self.norms, self.steps = result["losses"], result["norms"], result["steps"]
        self.val_losses = result["val_losses"]
        tensors = torch.load(out / f"{label} {name}-{rank}.pt", weights_only=True)
        self.grads, self.weights, self.ema = tensors["grads"], tensors["weights"], tensors["ema"]


def long_cases(label: str, which: str = "") -> list[dict[str, Any]]:
    """LONG, interleaved where `which` is a pipeline; and half of one of them."""
    cases = {**LONG, "interleaved half": {"until": 2, **LONG["interleaved"]}}
    stages = {"pp_stages": STAGES} if "pp" in which else {}
    return [{"name": f"{label} {name}", "mesh": which, **stages, **case} for name, case in cases.items()]


def named_cases(label: str, which: str = "") -> list[dict[str, Any]]:
    cases = [{"name": f"{label} {name}", "mesh": which, **case} for name, case in CASES.items()]
    # resumed from what another mesh saved after two steps
    cases.append({"name": f"{label} half", "mesh": which, "until": 2, **CASES["fused with dropout"]})
    return cases + (long_cases(label, which) if which in ("", "pp=2") else [])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    start(folder, "one", named_cases("one"), 1)
    for which in MESHES:
        start(folder, which, named_cases(which, which), 2)
    for which in ("", *MESHES):
        label = f"on {which or 'one'}"
        origins = ("one half", *(f"{m} half" for m in MESHES))
        cases = [
            {"name": f"{label} {o}", "mesh": which, "from": o, **CASES["fused with dropout"]}
            for o in origins
            if which or o != "one half"
        ]
        if which in ("", "pp=2"):
            stages = {"pp_stages": STAGES} if which else {}
            found = [o for o in ("one", "pp=2") if which or o != "one"]
            cases += [
                {"name": f"{label} {o} interleaved", "mesh": which, "from": f"{o} interleaved half", **stages}
                | LONG["interleaved"]
                for o in found
            ]
        start(folder, label, cases, 2 if which else 1)
    return folder


def agree(ours: dict[str, torch.Tensor], one: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Equal up to the order of additions in `dtype`; what is tiny beside the whole gradient is held to the whole."""
    assert ours.keys() == one.keys()
    for key, grad in one.items():
        error = (ours[key] - grad).norm()
        assert error <= 16 * torch.finfo(dtype).eps * max(float(grad.norm()), 0.05), (key, float(error))


@pytest.mark.parametrize(
    "which, name", [*((which, name) for which in MESHES for name in CASES), *(("pp=2", name) for name in LONG)]
)
def test_losses_and_gradients_are_those_of_one_process(out: Path, which: str, name: str) -> None:
    one, ours = Outcome(out, "one", name), Outcome(out, which, name)
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    agree(ours.grads, one.grads, dtype)
    eps = torch.finfo(dtype).eps
    assert len(ours.val_losses) == (4 if "eval_every" in {**CASES, **LONG}[name] else 1)
    assert ours.losses == pytest.approx(one.losses, rel=64 * eps)
    assert ours.val_losses == pytest.approx(one.val_losses, rel=64 * eps)
    assert ours.norms == pytest.approx(one.norms, rel=(256 if "muon" in name else 64) * eps)


@pytest.mark.parametrize("which", MESHES)
def test_the_comparison_can_fail(out: Path, which: str) -> None:
    """Even the wider bound, bfloat16's, tells gradients with dropout from those without."""
    plain, fused = Outcome(out, "one", "torch"), Outcome(out, which, "fused with dropout")
    with pytest.raises(AssertionError, match=r"blocks|embed"):
        agree(fused.grads, plain.grads, torch.bfloat16)


@pytest.mark.parametrize("which", MESHES)
def test_ranks_hold_the_same_weights_after_training(out: Path, which: str) -> None:
    for name in [*CASES, *(LONG if which == "pp=2" else [])]:
        first, second = Outcome(out, which, name), Outcome(out, which, name, rank=1)
        for key, w in first.weights.items():
            assert torch.equal(w, second.weights[key]), (name, key)
        for key, w in first.ema.items():
            assert torch.equal(w, second.ema[key]), (name, key)


@pytest.mark.parametrize("which", ["one", *MESHES])
@pytest.mark.parametrize("origin", ["one", *MESHES])
def test_a_run_saved_on_any_mesh_goes_on_on_any_other(out: Path, which: str, origin: str) -> None:
    if which == origin == "one":
        pytest.skip("tests/train/test_train.py")
    whole = Outcome(out, which, "fused with dropout")
    result = json.loads((out / f"on {which}.json").read_text())[f"on {which} {origin} half"]
    assert result["steps"] == [3, 4]
    if which == origin:  # the same ranks: bit for bit
        assert result["losses"] == whole.losses[2:]
        went_on = torch.load(out / f"on {which} {origin} half-0.pt", weights_only=True)["weights"]
        assert all(torch.equal(w, whole.weights[key]) for key, w in went_on.items())
    else:
        assert result["losses"] == pytest.approx(whole.losses[2:], rel=1e-5)


@pytest.mark.parametrize("which, origin", [("one", "pp=2"), ("pp=2", "one"), ("pp=2", "pp=2")])
def test_a_run_of_interleaved_stages_goes_on_anywhere(out: Path, which: str, origin: str) -> None:
    whole = Outcome(out, which, "interleaved")
    ours = Outcome(out, f"on {which}", f"{origin} interleaved")
    assert ours.steps == [3, 4]
    if which == origin:
        assert ours.losses == whole.losses[2:]
        assert all(torch.equal(w, whole.weights[key]) for key, w in ours.weights.items())
    else:
        assert ours.losses == pytest.approx(whole.losses[2:], rel=1e-5)


def test_each_rank_writes_what_it_alone_holds(out: Path) -> None:
    whole = out / "one half" / "checkpoints" / "step-00000002"
    cut = out / "fsdp=2 half" / "checkpoints" / "step-00000002"
    assert sorted(p.name for p in cut.glob("model*")) == [
        "model.rank-00000.safetensors",
        "model.rank-00001.safetensors",
    ]
    sizes = [p.stat().st_size for p in cut.glob("model*")]
    assert max(sizes) < 0.62 * (whole / "model.safetensors").stat().st_size
    stored, one = checkpoint.Stored(cut, "model"), checkpoint.Stored(whole, "model")
    assert stored.names() == one.names()
    assert all(stored.shape(n) == one.shape(n) == tuple(stored.read(n).shape) for n in one.names())


def test_one_flipped_byte_in_any_rank_s_file_is_refused_by_name(out: Path) -> None:
    folder = out / "fsdp=2 half" / "checkpoints" / "step-00000002"
    names = sorted(p.name for p in folder.iterdir())
    assert len(names) == 10  # model, optimizer, ema and random of two ranks, state, manifest
    for name in names:
        raw = (folder / name).read_bytes()
        bad = bytearray(raw)
        bad[len(raw) // 2] ^= 1
        (folder / name).write_bytes(bad)
        with pytest.raises(checkpoint.CheckpointError, match=name):
            checkpoint.verify(folder)
        (folder / name).unlink()
        with pytest.raises(checkpoint.CheckpointError, match=name):
            checkpoint.verify(folder)
        (folder / name).write_bytes(raw)
    (folder / "model.rank-00002.safetensors").write_bytes(b"")
    checkpoint.verify(folder)  # what the manifest does not name is no part of the checkpoint, and is not read
    (folder / "model.rank-00002.safetensors").unlink()
    checkpoint.verify(folder)


FOUR = ["dp=2,fsdp=2", "dp=2,tp=2", "fsdp=2,tp=2", "pp=2,dp=2", "pp=2,fsdp=2", "pp=2,tp=2"]


@pytest.mark.slow
def test_four_processes_in_every_combination(tmp_path: Path) -> None:
    start(tmp_path, "one", named_cases("one"), 1)
    for which in FOUR:
        staged = "pp" in which
        start(tmp_path, which, named_cases(which, which) + (long_cases(which, which) if staged else []), 4)
        for name in [*CASES, *(LONG if staged else [])]:
            test_losses_and_gradients_are_those_of_one_process(tmp_path, which, name)
    cases = [{"name": f"on one {which} half", "from": f"{which} half", **CASES["fused with dropout"]} for which in FOUR]
    cases.append({"name": "on one long", "from": "pp=2,fsdp=2 interleaved half", **LONG["interleaved"]})
    start(tmp_path, "on one", cases, 1)  # and one process goes on from what each of them saved
    for label, name in [*((f"{which} half", "fused with dropout") for which in FOUR), ("long", "interleaved")]:
        ours, whole = Outcome(tmp_path, "on one", label), Outcome(tmp_path, "one", name)
        assert ours.losses == pytest.approx(whole.losses[2:], rel=1e-5)
    # and shards of stages go on from what one process saved, and bit for bit from what they saved
    label, which = "on shards", "pp=2,fsdp=2"
    case = {"mesh": which, "pp_stages": STAGES, **LONG["interleaved"]}
    origins = ("one", which)
    start(tmp_path, label, [{"name": f"{label} {o}", "from": f"{o} interleaved half", **case} for o in origins], 4)
    whole = Outcome(tmp_path, which, "interleaved")
    assert Outcome(tmp_path, label, "one").losses == pytest.approx(whole.losses[2:], rel=1e-5)
    ours = Outcome(tmp_path, label, which)
    assert ours.losses == whole.losses[2:]
    assert all(torch.equal(w, whole.weights[key]) for key, w in ours.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("which", ["dp=2,fsdp=2,tp=2", "pp=2,dp=2,tp=2", "pp=2,dp=2,fsdp=2", "pp=2,fsdp=2,tp=2"])
def test_eight_processes_in_three_dimensions(tmp_path: Path, which: str) -> None:
    names = ("accumulation", "recompute")
    start(tmp_path, "one", [{"name": f"one {name}", **CASES[name]} for name in names], 1)
    start(tmp_path, which, [{"name": f"{which} {name}", "mesh": which, **CASES[name]} for name in names], 8)
    for name in names:
        test_losses_and_gradients_are_those_of_one_process(tmp_path, which, name)


@pytest.mark.slow
def test_sixteen_processes_in_every_dimension_at_once(tmp_path: Path) -> None:
    """Hybrid shards of stages of tensor-parallel parts, two stages a rank."""
    which, case = "dp=2,fsdp=2,tp=2,pp=2", {"dropout": 0.2, "micro": 1, "steps": 2, "batch": 10, "shape": {"layers": 4}}
    start(tmp_path, "one", [{"name": "one all", **case}], 1)
    start(tmp_path, which, [{"name": f"{which} all", "mesh": which, "pp_stages": STAGES, **case}], 16)
    one, ours = Outcome(tmp_path, "one", "all"), Outcome(tmp_path, which, "all")
    agree(ours.grads, one.grads, torch.float32)
    assert ours.losses == pytest.approx(one.losses, rel=1e-5)
    assert ours.norms == pytest.approx(one.norms, rel=1e-5)


@pytest.mark.slow
def test_a_pipeline_of_three_stages_with_blocks_left_over(tmp_path: Path) -> None:
    case = {"dropout": 0.2, "kernels": "fused", "micro": 1, "recompute": "half", "shape": {"layers": 4}}
    start(tmp_path, "one", [{"name": "one long", **case}], 1)
    start(tmp_path, "pp=3", [{"name": "pp=3 long", "mesh": "pp=3", **case}], 3)
    one, ours = Outcome(tmp_path, "one", "long"), Outcome(tmp_path, "pp=3", "long")
    agree(ours.grads, one.grads, torch.float32)
    assert ours.losses == pytest.approx(one.losses, rel=1e-5)


def play(ranks: int, each: int, micros: int) -> tuple[list[int], int]:
    """A step by every rank's order, over links that give what was sent in the order sent: the most that each rank had in
    flight, and the time (a stage's forward takes one unit, its backward two). Stops where all wait."""
    orders = [list(stages.schedule(rank, ranks, each, micros)) for rank in range(ranks)]
    links: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    clock, flying, most, waiting = [0] * ranks, [0] * ranks, [0] * ranks, list(orders)
    moved = True
    while moved:
        moved = False
        for rank in (r for r in range(ranks) if waiting[r]):
            what, i, k = waiting[rank][0]
            stage, way = rank + ranks * k, 1 if what == "forward" else -1
            if 0 <= stage - way < ranks * each:
                sent = links.get(((stage - way) % ranks, rank, way))
                if not sent:
                    continue
                micro, source, arrived = sent.pop(0)
                assert (micro, source) == (i, stage - way)
                clock[rank] = max(clock[rank], arrived)
            clock[rank] += 1 if way > 0 else 2
            if 0 <= stage + way < ranks * each:
                links.setdefault((rank, (stage + way) % ranks, way), []).append((i, stage, clock[rank]))
            flying[rank] += way
            most[rank] = max(most[rank], flying[rank])
            waiting[rank] = waiting[rank][1:]
            moved = True
    assert not any(waiting)
    assert flying == [0] * ranks
    assert all(len(order) == len(set(order)) == 2 * each * micros for order in orders)
    return most, max(clock)


@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_stages_take_turns_with_few_micro_batches_in_flight(ranks: int, each: int) -> None:
    for micros in range(1, 14):
        most, time = play(ranks, each, micros)
        assert most == [min(stages.ahead(r, ranks, each, micros) + 1, each * micros) for r in range(ranks)]
        if each == 1:
            assert most == [min(ranks - r, micros) for r in range(ranks)]
        assert 1 - 3 * each * micros / time == pytest.approx(stages.idle(ranks, each, micros))


# ------------------------------------------------------------------------------------------------- who a process is


def test_launchers_are_told_apart() -> None:
    assert mesh.find({}) is None
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert mesh.find(torchrun) == mesh.Place(3, 4, 1, 2)
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    assert mesh.find(slurm) is None  # a batch script: it runs once, whatever number of tasks was asked for
    place = mesh.find({**slurm, "SLURM_STEP_ID": "0"})
    assert place == mesh.Place(5, 8, 1, by="slurm")
    env = {"SLURM_STEP_NODELIST": "gpu[007-009,12],login1", "SLURM_JOB_ID": "40123"}
    assert mesh.address(env, place) == ("gpu007", 20123)
    with pytest.raises(InputError, match="SLURM_LOCALID"):
        mesh.find({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"})
    assert [mesh.first_host(n) for n in ("a", "a,b", "a[1-2]b,c", "n[04,07]")] == ["a", "a", "a1b", "n04"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("dp", "'dp' in 'dp' is not"),
        ("dp=0", "'dp=0'"),
        ("xy=2", "no dimension xy"),
        ("cp=2", "--mesh cp=2 is not built"),
        ("ep=2", "--mesh ep=2 is not built"),
        ("dp=2,dp=2", "names dp twice"),
    ],
)
def test_what_a_mesh_cannot_be_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mesh.parse(text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 3, "width": 96}, "--mesh tp=2 must divide --heads, which is 3"),
        ({"kv_heads": 1}, "--mesh tp=2 must divide --kv-heads, which is 1"),
        ({"hidden": 33}, "--mesh tp=2 must divide --hidden, which is 33"),
        ({"context": 17}, "--mesh tp=2 must divide --context, which is 17"),
        ({"vocab": 1}, "--mesh tp=2 leaves a rank without one of the 1 rows"),
    ],
)
def test_tensor_parallel_names_what_it_cannot_cut(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tensor_parallel.cuts(GPT(named("nano", "llama", **changes)), 2)


def test_tensor_parallel_cuts_every_element_once() -> None:
    model = GPT(named("nano", "llama", kv_heads=2, vocab=67))
    for name, cut in tensor_parallel.cuts(model, 2).items():
        whole = dict(model.named_parameters())[name].detach()
        again = torch.full_like(whole, torch.nan)
        for rank in range(2):
            part = cut.take(whole, rank)
            assert tuple(part.shape) == cut.local(rank)
            cut.put(again, part, rank)
        assert torch.equal(again, whole), name


@pytest.mark.parametrize(
    "sizes, flags, message",
    [
        ({"tp": 2}, {"compile": True}, "--compile with --mesh tp"),
        ({"pp": 2}, {"compile": True}, "--compile with --mesh pp"),
        ({"fsdp": 2}, {"compile": True}, "--compile with --mesh fsdp"),
        ({"tp": 2}, {"lora_rank": 4}, "--lora-rank with --mesh tp"),
        ({"pp": 2}, {"lora_rank": 4}, "--lora-rank with --mesh pp"),
        ({"fsdp": 2}, {"lora_rank": 4}, "--lora-rank with --mesh fsdp"),
        ({"dp": 2}, {"pp_stages": 2}, r"--pp-stages must be 1 without a pipeline .*; it is 2"),
    ],
)
def test_what_is_not_built_together_is_refused(sizes: dict[str, int], flags: dict[str, Any], message: str) -> None:
    ranks = mesh.ProcessGroup.__new__(
        mesh.ProcessGroup
    )  # no other process is there: nothing may be sent before the refusal
    ranks.sizes = {name: sizes.get(name, 1) for name in mesh.BUILT}
    with pytest.raises(InputError, match=message):
        parallel.wrap(GPT(named("nano")), parallel_worker.config(**flags), ranks)


@pytest.mark.parametrize(
    "name, model, message",
    [
        ("tp", torch.nn.Linear(2, 2), "--mesh tp=2 cuts fastlm's GPT and not a Linear"),
        ("pp", torch.nn.Linear(2, 2), "--mesh pp=2 cuts fastlm's GPT and not a Linear"),
        ("pp", GPT(named("nano", layers=1)), "--mesh pp=2 needs a block for each of 2 stages; --layers is 1"),
        (
            "pp, two stages a rank",
            GPT(named("nano", layers=3)),
            "--mesh pp=2 with --pp-stages 2 needs a block for each of 4 stages; --layers is 3",
        ),
    ],
)
def test_models_that_cannot_be_cut_are_refused(name: str, model: torch.nn.Module, message: str) -> None:
    ranks = mesh.ProcessGroup.__new__(mesh.ProcessGroup)
    ranks.sizes = {n: 2 if n == name[:2] else 1 for n in mesh.BUILT}
    with pytest.raises(InputError, match=message):
        tensor_parallel.cuts(model, 2) if name == "tp" else pipeline.cut(model, ranks, None, 1 + ("two" in name))


def test_processes_and_mesh_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlm.train.config import RunConfig

    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    assert launch.processes(RunConfig(device="cpu")) == 1
    assert launch.processes(RunConfig(device="cpu", mesh="dp=2,fsdp=2")) == 4
    assert launch.processes(RunConfig(device="cpu", nproc=3)) == 3
    with pytest.raises(InputError, match="--nproc 3 and --mesh dp=2"):
        launch.processes(RunConfig(device="cpu", mesh="dp=2", nproc=3))
    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(InputError, match="beside torchrun"):
        launch.processes(RunConfig(device="cpu", nproc=2))
