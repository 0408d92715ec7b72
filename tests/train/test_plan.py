"""`fastlm plan`: its memory estimate is held against what real jobs take, its choice against what can be."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from fastlm.cli import main as cli
from fastlm.data import InputError
from fastlm.models.gpt import GPT, named
from fastlm.train import launch, mesh
from fastlm.train.config import Config
from fastlm.train.costs import Costs
from fastlm.train.plan import plans
from paths import python_path

# A first job that is small, then one that is large: what the second adds to the process's peak is what was estimated,
# whatever the process itself takes.
SCRIPT = """
import gc, json, os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
import torch
from fastlm.models.gpt import GPT, named
from fastlm.train import machine, mesh
from fastlm.train.costs import Costs
from fastlm.train.loop import Trainer
from parallel_worker import config

class Text:
    content = "text"
    def batch(self, ids):
        tokens = torch.randint(256, (len(ids), 257))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

which, out = sys.argv[2], Path(sys.argv[3])
torch.set_num_threads(1)
ranks, found = mesh.start(which, "cpu"), []
for number, case in enumerate(json.loads(sys.argv[4])):
    machine.spare_page_faults()
    sizes = {"layers": case.pop("layers", 3), "width": 256, "context": 256}
    shape = named("nano", case.pop("style", "llama"), dropout=case.pop("dropout", 0.0), **sizes)
    made = config(mesh=which, steps=2, **case)
    folder = out / str(number)
    if ranks.first:
        folder.mkdir()
    trainer = Trainer(made, GPT(shape), Text(), folder, ranks=ranks)
    trainer.fit()
    del trainer
    gc.collect()
    costs = Costs.of(shape, made, "cpu", ranks.sizes)
    found.append((machine.peak_memory(torch.device("cpu")), costs.memory))
(out / f"rank{ranks.rank}.json").write_text(json.dumps(found))
ranks.close()
mesh.leave(0)
"""


GROWING = [{"batch": 2}, {"batch": 16}]
INTERLEAVED = [{"batch": 8 * micro, "micro": micro, "layers": 4, "pp_stages": 2} for micro in (1, 4)]


def measure(which: str, tmp_path: Path, *cases: dict[str, Any]) -> list[list[list[int]]]:
    """Of each rank, of each case: (peak so far, estimate)."""
    processes = math.prod(mesh.parse(which).values())
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), python_path(), which, str(tmp_path), json.dumps(cases)]
    assert launch.run(command, processes, 1) == 0
    return [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(processes)]


@pytest.mark.grid(fast=1)
@pytest.mark.parametrize(
    "which, cases",
    [
        ("tp=1", GROWING),
        ("tp=2", GROWING),
        *(
            pytest.param(which, cases, marks=pytest.mark.slow)
            for which, cases in (("fsdp=2", GROWING), ("pp=2", GROWING), ("pp=2,fsdp=2", GROWING))
        ),
        *(pytest.param(which, INTERLEAVED, marks=pytest.mark.slow) for which in ("pp=2", "pp=2,fsdp=2")),
    ],
)
def test_the_estimate_of_memory_is_what_a_job_takes(which: str, cases: list[dict[str, Any]], tmp_path: Path) -> None:
    found = measure(which, tmp_path, *cases)
    (small, estimate), (large, more) = max(found, key=lambda rank: rank[1][0])  # the fullest rank is what is estimated
    assert 0.7 < (more - estimate) / (large - small) < 1.3
    assert 0.9 < more / large < 1.4
    assert 0.9 < estimate / small < 1.4


def test_a_mesh_shares_out_what_one_process_holds() -> None:
    shape, config = named("small", vocab=256), Config()
    one = Costs.of(shape, config, "cuda")
    assert one.sent == {}
    dp = Costs.of(shape, config, "cuda", {"dp": 2})
    assert {k: dp.parts[k] for k in ("weights", "gradients", "optimizer")} == {
        k: one.parts[k] for k in ("weights", "gradients", "optimizer")
    }
    assert dp.sent == {"dp: gradients": 4 * one.parameters}  # a ring of two sends as much as it sums
    fsdp = Costs.of(shape, config, "cuda", {"fsdp": 4})
    assert fsdp.parts["weights"] == pytest.approx(one.parts["weights"] / 4, rel=1e-3)
    assert fsdp.sent["fsdp: gradients"] == 4 * one.parameters * 3 // 4
    tp = Costs.of(shape, config, "cuda", {"tp": 2})
    whole = 4 * sum(p.numel() for n, p in GPT(shape).named_parameters() if "norm" in n or n.endswith("place.weight"))
    bias = 4 * sum(p.numel() for n, p in GPT(shape).named_parameters() if n.endswith(("out.bias", "down.bias")))
    assert tp.parts["weights"] - whole - bias == (one.parts["weights"] - whole - bias) / 2
    assert tp.parts["activations"] < 0.75 * one.parts["activations"]
    pp = Costs.of(shape, config, "cuda", {"pp": 2})
    blocks = 4 * sum(p.numel() for n, p in GPT(shape).named_parameters() if n.startswith("blocks."))
    assert (
        pp.parts["weights"] == one.parts["weights"] - blocks / 2 - 4 * 256 * 384
    )  # the last: it has the logits, no positions
    assert pp.sent == {"pp: activations": 8 * 256 * 384 * 4}
    both = Costs.of(shape, config, "cuda", {"fsdp": 2, "tp": 2})
    assert both.parts["weights"] < 0.55 * tp.parts["weights"]


def test_the_plan_taken_fits_and_the_impossible_is_named() -> None:
    config = Config()
    config.optim.batch, config.run.dtype = 6, "bfloat16"
    shape = named("1B", "llama", vocab=32000)
    found, refused = plans(shape, config, 8, 24 << 30, "cuda")
    few = "--batch 6 has no sample for each of 8 ranks"
    assert refused == dict.fromkeys(("dp=8", "fsdp=8", "dp=2,fsdp=4", "dp=4,fsdp=2"), few)
    assert found[0].fits
    assert {p.mesh for p in found} == {
        *("tp=8", "dp=2,tp=4", "fsdp=2,tp=4", "dp=4,tp=2", "fsdp=4,tp=2", "dp=2,fsdp=2,tp=2"),
        *("pp=8", "pp=2,tp=4", "pp=4,tp=2", "pp=2,dp=4", "pp=4,dp=2", "pp=2,dp=2,tp=2"),
        *("pp=2,fsdp=4", "pp=4,fsdp=2", "pp=2,dp=2,fsdp=2", "pp=2,fsdp=2,tp=2"),
    }
    for plan in found:
        assert plan.fits == (plan.costs.memory <= 24 << 30)
    assert found[0].flops / (1 - found[0].idle) == min(p.flops / (1 - p.idle) for p in found if p.fits)
    whole = found[0].costs.flops_per_sample * 6 / 8
    assert all(p.flops == pytest.approx(whole * {"none": 1, "half": 7 / 6, "full": 4 / 3}[p.recompute]) for p in found)
    found, refused = plans(named("nano", heads=3, width=96), Config(), 2, 8 << 30, "cpu")
    assert refused == {"tp=2": "--mesh tp=2 must divide --heads, which is 3"}
    assert [p.mesh for p in found] == ["dp=2", "fsdp=2", "pp=2"]  # one that idles comes last
    found, refused = plans(named("nano", layers=1), Config(), 2, 8 << 30, "cpu")
    assert refused == {"pp=2": "pp=2 needs a block for each of 2 stages; --layers is 1"}
    assert not plans(named("7B"), Config(), 1, 8 << 30, "cuda")[0][0].fits


def test_several_stages_a_rank_idle_less_and_send_more() -> None:
    shape, config = named("small", layers=8, heads=8, vocab=256), Config()
    config.optim.batch, config.optim.micro = 16, 2
    plain = {p.mesh: p for p in plans(shape, config, 4, 80 << 30, "cuda")[0]}
    config.run.pp_stages = 2
    found, refused = plans(shape, config, 4, 80 << 30, "cuda")
    assert refused == {}
    for plan in found:
        one, pp = plain[plan.mesh], plan.sizes["pp"]
        assert plan.costs.parts["weights"] == one.costs.parts["weights"]
        if pp == 1:
            assert plan == one
            continue
        micros = 16 // (plan.sizes["dp"] * plan.sizes["fsdp"]) // plan.micro
        assert plan.idle == pytest.approx((pp - 1) / (pp - 1 + 2 * micros))
        assert plan.idle < one.idle
        assert plan.sent > one.sent
        # a whole round ahead of the first backward
        assert plan.costs.parts["activations"] > one.costs.parts["activations"]
        assert f"--mesh {plan.mesh} --pp-stages 2" in plan.flags
    sent = [p.costs.sent["pp: activations"] for p in (plain["pp=4"], *(p for p in found if p.mesh == "pp=4"))]
    assert [n / (16 * shape.context * shape.width * 4) for n in sent] == [1, 3]  # the fullest rank is the last
    config.run.pp_stages = 4
    _, refused = plans(shape, config, 4, 80 << 30, "cuda")
    assert refused == {"pp=4": "pp=4 with --pp-stages 4 needs a block for each of 16 stages; --layers is 8"}


@pytest.mark.slow
@pytest.mark.grid
def test_the_command_prints_every_mesh_and_what_to_take(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--devices", "4", "--device", "cuda", "--memory", "80", "--size", "124M", "--batch", "32"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("dp=2,tp=2", "fsdp=4", "activations", "take: fastlm train --mesh dp=4"))
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["take"].startswith("--mesh dp=4 --micro 8")
    assert {p["mesh"] for p in found["plans"]} == {
        *("dp=4", "dp=2,fsdp=2", "fsdp=4", "dp=2,tp=2", "fsdp=2,tp=2", "tp=4"),
        *("pp=4", "pp=2,dp=2", "pp=2,tp=2", "pp=2,fsdp=2"),
    }
    assert (
        cli.main(["plan", "--devices", "2", "--device", "cuda", "--memory", "8", "--size", "7B", "--batch", "2"]) == 1
    )
    assert "nothing fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--devices", "0"], "--devices must be at least 1 and at most 65536; it is 0"),
        (["--memory", "-1"], "--memory must be at least 0 and finite; it is -1.0"),
        (["--devices", "5", "--batch", "2"], "--batch 2 has no sample for each of 5 ranks"),
        (["--tokenizer", "chars"], "give --rows"),
        (["--init", "somewhere"], "somewhere"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_plans_are_of_one_device_or_more() -> None:
    with pytest.raises(InputError, match="--devices"):
        plans(named("nano"), Config(), 0, 1 << 30, "cpu")
