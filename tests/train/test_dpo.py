"""`fastlm train --dpo`: the loss of pairs beside float64 and TRL, and references that are computed once and found again."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastlm.cli import main as cli
from fastlm.data import InputError, TokenSource
from fastlm.models import loss as losses
from fastlm.models.gpt import GPT, named
from fastlm.train import checkpoint, job, reference
from fastlm.train.files import read_metrics
from test_sft import exported, gradients, settings, tokenizer
from torch import Tensor

CONTEXT = 64
LOG2 = math.log(2)


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))


def pairs(path: Path, count: int = 60, first: int = 0) -> str:
    """Answers of unequal lengths: the chosen in capitals, the rejected in small letters."""
    with open(path, "w") as file:
        for i in range(first, first + count):
            draw = np.random.default_rng(i)
            one, two, three = (
                bytes(draw.integers(97, 123, draw.integers(1, n)).tolist()).decode() for n in (20, 20, 30)
            )
            file.write(json.dumps({"prompt": one, "chosen": two.upper(), "rejected": three}) + "\n")
    return str(path)


def base(tmp_path: Path, name: str = "base", **changes: Any) -> str:
    (tmp_path / "book.txt").write_text("some words of a text\n" * 200)
    job.start(settings(name=name, sft=False, **changes), (str(tmp_path / "book.txt"),)).run(say=lambda text: None)
    return name


def dpo(init: str, **changes: Any) -> Any:
    shape = {"layers": None, "heads": None, "width": None}
    return settings(**{**shape, "sft": False, "dpo": True, "init": init, "lr": 1e-3, "warmup": 0, **changes})


def said(made: job.Job) -> str:
    lines: list[str] = []
    made.run(say=lines.append)
    return "\n".join(lines)


def plain_model(style: str = "llama") -> GPT:
    torch.manual_seed(0)
    made = GPT(named("nano", style, layers=2, heads=2, width=32, context=CONTEXT, vocab=256))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3.0)
    return made


def batch_of(tmp_path: Path, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs, targets, documents and references, drawn, of three samples."""
    found = job.read_data((pairs(tmp_path / "p.jsonl"),), dpo("x").data, CONTEXT)
    draw = np.random.default_rng(seed)
    for one in found:
        one.references = {
            side: draw.normal(-30, 5, (one.pairs(side), 2)).astype(np.float32) for side in ("train", "val")
        }
    return TokenSource(found, CONTEXT, 1).batch(np.arange(3))


def answers(batch: tuple[Tensor, ...]) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """(inputs, targets, reference) of the chosen and the rejected answer of each pair."""
    inputs, targets, documents, given = batch
    out = []
    for row in range(0, len(inputs), 2):
        for number in documents[row].unique():
            pair = []
            for r in (row, row + 1):
                here = documents[r] == number
                pair.append((inputs[r][here], targets[r][here], given[r, number]))
            if (pair[0][1] >= 0).any():
                out.append(pair)
    return out


def one_by_one(
    model: GPT, batch: tuple[Tensor, ...], beta: float, smoothing: float, per_token: bool
) -> tuple[Tensor, int]:
    """The summed loss of the pairs, each answer in a forward of its own, and their number."""
    dtype = next(model.parameters()).dtype
    total, found = torch.zeros((), dtype=dtype), answers(batch)
    for pair in found:
        gained = []
        for inputs, targets, given in pair:
            kept = targets >= 0
            logs = model(inputs[None])[0].log_softmax(-1)[kept].gather(1, targets[kept][:, None]).sum()
            gained.append((logs - given.to(dtype)) / (int(kept.sum()) if per_token else 1))
        z = beta * (gained[0] - gained[1])
        total = total - (1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
    return total, len(found)


@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize(("smoothing", "per_token", "chunk"), [(0.0, False, 0), (0.2, True, 24)])
def test_the_loss_of_pairs_is_that_of_each_answer_alone(
    style: str, smoothing: float, per_token: bool, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk:
        monkeypatch.setattr(losses, "chunk_rows", lambda vocab: chunk)
    batch, plain = batch_of(tmp_path), plain_model(style)
    exact = copy.deepcopy(plain).double()
    options = {"beta": 0.3, "smoothing": smoothing, "normalized": per_token}
    ours = plain(*batch, **options)
    want, count = one_by_one(exact, batch, 0.3, smoothing, per_token)
    assert count > 3, "several pairs share a context"
    assert ours.item() == pytest.approx(want.item(), rel=1e-5)
    mine, truth = gradients(plain, ours), gradients(exact, want)
    assert (mine - truth).abs().max() < 5e-5 * truth.abs().max(), "a whole module in float32"
    with torch.no_grad():
        both = plain(*batch, **options, wins=True)
    assert both[0].item() == pytest.approx(want.item(), rel=1e-5)
    assert 0 <= both[1] <= count


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_dpo_equals_trl(loss_type: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", minversion="1.16", reason="trl (of the extra dev) is not installed")
    transformers, datasets = pytest.importorskip("transformers"), pytest.importorskip("datasets")
    batch, plain = batch_of(tmp_path), plain_model()
    theirs = exported(plain, tmp_path / "hf", transformers)
    options = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.3, loss_type=[loss_type], report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, max_length=None,
    )  # fmt: skip
    rows = [{"prompt": "t5", "chosen": "t6", "rejected": "t7"}] * 2
    trainer = trl.DPOTrainer(
        model=theirs,
        ref_model=copy.deepcopy(theirs),
        args=options,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(transformers),
    )
    found = answers(batch)
    sides = [[pair[a] for pair in found] for a in range(2)]
    longest = max(len(inputs) for side in sides for inputs, *_ in side) + 1
    ids, seen, mask = (torch.zeros(2 * len(found), longest, dtype=torch.long) for _ in range(3))
    for at, (inputs, targets, _) in enumerate([*sides[0], *sides[1]]):
        whole = torch.cat((inputs, targets[-1:]))
        ids[at, : len(whole)], seen[at, : len(whole)], mask[at, 1 : len(whole)] = whole, 1, (targets >= 0).long()
    trainer.precompute_ref_logps = True
    given = {
        name: torch.stack([g for *_, g in side])
        for name, side in zip(("ref_chosen_logps", "ref_rejected_logps"), sides)
    }
    trainer.model.train()
    loss = trainer._compute_loss(
        trainer.model, {"input_ids": ids, "attention_mask": seen, "completion_mask": mask, **given}, False
    )
    ours = plain(*batch, beta=0.3, normalized=loss_type == "sigmoid_norm") / len(found)
    assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
    ours.backward()
    loss.backward()
    compared = {
        "model.embed_tokens.weight": plain.embed.weight,
        "model.norm.weight": plain.norm.weight,
        "model.layers.0.self_attn.o_proj.weight": plain.blocks[0].attn.out.weight,
        "model.layers.1.mlp.down_proj.weight": plain.blocks[1].mlp.down.weight,
    }
    named_theirs = dict(trainer.model.named_parameters())
    for name, mine in compared.items():
        assert torch.allclose(mine.grad, named_theirs[name].grad, atol=1e-5, rtol=1e-4), name


# ------------------------------------------------------------------------------------------------------------ the reference


def test_the_reference_is_computed_once_and_found_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, corpus = base(tmp_path), pairs(tmp_path / "p.jsonl")
    assert "reference: 60 pairs, 60 computed now" in said(job.start(dpo(init, name="one"), (corpus,)))
    assert "reference: 60 pairs, 0 computed now" in said(job.start(dpo(init, name="two", lr=1e-4), (corpus,)))
    assert "60 pairs, 0 computed" in said(job.start(dpo(init, name="lora", lora_rank=2), (corpus,))), (
        "the same frozen base"
    )
    more = Path(corpus).read_text() + Path(pairs(tmp_path / "more.jsonl", 5, first=100)).read_text()
    (tmp_path / "p2.jsonl").write_text(more)
    assert "reference: 65 pairs, 5 computed now" in said(
        job.start(dpo(init, name="three"), (str(tmp_path / "p2.jsonl"),))
    )
    other = base(tmp_path, "other", seed=5)
    assert "reference: 60 pairs, 60 computed now" in said(job.start(dpo(other, name="four"), (corpus,)))


def test_the_loss_starts_at_log_2_and_is_not_stuck_there(tmp_path: Path) -> None:
    init, corpus = base(tmp_path), pairs(tmp_path / "p.jsonl")
    for name, options in (("all", {}), ("lora", {"lora_rank": 2, "lr": 1e-2})):
        made = job.start(dpo(init, name=name, steps=12, beta=0.5, **options), (corpus,))
        text = said(made)
        rows = read_metrics(made.folder)
        assert rows[0]["loss"] == pytest.approx(LOG2, abs=1e-4)
        assert rows[-1]["loss"] < 0.9 * LOG2
        assert "of the pairs the right way round" in text
        val = json.loads((made.folder / "result.json").read_text())["val"]
        assert val["val_loss"] < LOG2
        assert 0.5 < val["val_accuracy"] <= 1


@pytest.mark.parametrize("micro", [2])
def test_a_pair_weighs_the_same_however_a_step_is_cut(micro: int, tmp_path: Path) -> None:
    init, corpus = base(tmp_path), pairs(tmp_path / "p.jsonl")
    found = []
    for each in (0, micro):
        made = job.start(dpo(init, name=f"micro{each}", micro=each, batch=5, lr=1e-2), (corpus,))
        said(made)
        found.append(read_metrics(made.folder))
    for one, two in zip(*found):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_a_stopped_run_goes_on_bit_for_bit_without_the_cache_and_its_init(tmp_path: Path) -> None:
    init, corpus = base(tmp_path), pairs(tmp_path / "p.jsonl")
    whole = job.start(dpo(init, name="whole", steps=4, dropout=0.1), (corpus,))
    said(whole)
    part = job.start(dpo(init, name="part", steps=4, dropout=0.1), (corpus,))
    step = part.trainer.train_step

    def stop() -> None:
        step()
        if part.trainer.step == 2:
            part.trainer.stop = "signal SIGINT"

    part.trainer.train_step = stop  # type: ignore[method-assign]
    said(part)
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "runs" / init)
    config, names = job.read_config(part.folder)
    again = job.resume(part.folder, config, names, other_data=False, say=lambda text: None)
    assert "60 pairs, 0 computed now" in said(again)
    saved = [checkpoint.Stored(checkpoint.newest(run.folder, print), "model").load() for run in (whole, again)]
    for name, tensor in saved[0].items():
        assert torch.equal(tensor, saved[1][name]), name
    Path(corpus).write_text(Path(corpus).read_text() + Path(pairs(tmp_path / "more.jsonl", 3, first=90)).read_text())
    with pytest.raises(InputError, match="3 pairs are not among those that the run began with"):
        job.resume(part.folder, config, names, other_data=True, say=lambda text: None)


def test_a_damaged_reference_is_named(tmp_path: Path) -> None:
    init, corpus = base(tmp_path), pairs(tmp_path / "p.jsonl")
    made = job.start(dpo(init, name="one"), (corpus,))
    said(made)
    (kept,) = (tmp_path / "cache" / "references").glob("*/*.npy")
    kept.write_bytes(kept.read_bytes()[:-7])
    with pytest.raises(InputError, match=f"{kept.name} cannot be read"):
        job.start(dpo(init, name="two"), (corpus,))
    assert not Path("runs/two").exists()
    assert reference.read(made.folder / reference.FILE).keys()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp=2", "fsdp=2", "tp=2", "pp=2"])
def test_every_mesh_learns_from_pairs_as_one_process_does_and_finds_its_reference(
    mesh: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base(tmp_path)
    corpus = pairs(tmp_path / "p.jsonl")
    flags = [
        "--dpo",
        "--init",
        "base",
        "--context",
        "64",
        "--steps",
        "3",
        "--batch",
        "5",
        "--micro",
        "1",
        "--sample",
        "0",
    ]
    flags += ["--threads", "1", "--device", "cpu", "--quiet", "--lr", "1e-2", "--warmup", "0"]
    assert cli.main(["train", corpus, *flags, "--name", "many", "--mesh", mesh]) == 0
    assert "60 pairs, 60 computed now" in capfd.readouterr().out
    assert cli.main(["train", corpus, *flags, "--name", "one"]) == 0
    assert "60 pairs, 0 computed now" in capfd.readouterr().out
    one, many = (read_metrics(Path("runs") / name) for name in ("one", "many"))
    for a, b in zip(one, many):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    assert one[-1]["val_loss"] == pytest.approx(many[-1]["val_loss"], rel=1e-3)
    assert one[-1]["val_accuracy"] == pytest.approx(many[-1]["val_accuracy"])


# ---------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "completion": "b"}, "it is a row for --sft"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
        ({"prompt": "a" * 80, "chosen": "b", "rejected": "c"}, "fills the context of 64 tokens"),
        ({"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"}, "chosen must be a text"),
    ],
)
def test_a_pair_that_tells_nothing_is_named_by_its_line(row: Any, why: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    path.write_text("\n".join([good, good, json.dumps(row), good]) + "\n")
    with pytest.raises(InputError) as error:
        job.read_data((str(path),), dpo("x").data, CONTEXT)
    assert why in str(error.value)
    assert f"{path}, line 3: " in str(error.value)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"init": ""}, "--dpo needs a model to start from"),
        ({"sft": True}, "--sft and --dpo exclude each other"),
        ({"z_loss": 0.1}, "--z-loss and --dpo exclude each other"),
        ({"smoothing": 0.5}, "--smoothing with --dpo must be below 0.5"),
    ],
)
def test_flags_that_cannot_go_with_dpo_are_refused_by_name(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        dpo(**{"init": "x", **changes}).check()


def test_data_show_tells_chosen_from_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ({"prompt": f"{i}? ", "chosen": "YES", "rejected": "nope"} for i in range(100, 160))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["data", "show", "0", "p.jsonl", "--dpo", "--context", "24"]) == 0
    text = capsys.readouterr().out
    assert text.count("[[YES<stop>]]\n--- chosen: 4 of 9 tokens trained") == 2
    assert text.count("[[nope<stop>]]\n--- rejected: 5 of 10 tokens trained") == 2
