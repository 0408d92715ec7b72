"""`fastlm train --sft`: loss and gradients are those of the rows alone, whatever packs, cuts, fuses or shares them out."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
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
from fastlm.train import Config, checkpoint, job
from fastlm.train.files import read_metrics
from torch import Tensor

CONTEXT = 64


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))


def settings(**changes: Any) -> Config:
    made = Config()
    defaults = {"layers": 2, "heads": 2, "width": 32, "context": CONTEXT, "steps": 2, "batch": 4, "eval_every": 0}
    defaults |= {"save_every": 0, "sample": 0, "threads": 1, "device": "cpu", "quiet": True, "sft": True, "clip": 0.0}
    for name, value in {**defaults, **changes}.items():
        group = next(g for g in vars(made).values() if name in {f.name for f in dataclasses.fields(g)})
        setattr(group, name, value)
    return made


def rows(path: Path, count: int = 80) -> str:
    """Prompts and answers of any lengths, so that contexts hold unequal numbers of trained tokens."""
    draw = np.random.default_rng(1)
    text = lambda most: "".join(map(chr, draw.integers(97, 123, draw.integers(1, most))))
    with open(path, "w") as file:
        for i in range(count):
            chat = [{"role": "user", "content": text(9)}, {"role": "assistant", "content": text(20)}]
            row = {"messages": chat} if i % 3 == 0 else {"prompt": text(20), "completion": text(30)}
            file.write(json.dumps(row) + "\n")
    return str(path)


def one_by_one(model: GPT, batch: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    """The mean loss of the trained tokens, each sequence in a forward of its own, and their number."""
    total, count = torch.zeros((), dtype=next(model.parameters()).dtype), 0
    for inputs, targets, documents in zip(*batch):
        for number in documents.unique():
            own, wanted = inputs[documents == number], targets[documents == number]
            kept = wanted >= 0
            if kept.any():
                logits = model(own[None])[0]
                total = total + F.cross_entropy(logits[kept], wanted[kept], reduction="sum")
                count += int(kept.sum())
    return total / count, count


def gradients(model: torch.nn.Module, loss: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize("chunk", [0, 24])
def test_the_mask_is_not_ignored_with_packing_nor_by_the_chunked_loss(
    style: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk:
        monkeypatch.setattr(losses, "chunk_rows", lambda vocab: chunk)
    found = job.read_data((rows(tmp_path / "a.jsonl"),), settings().data, CONTEXT)
    source = TokenSource(found, CONTEXT, 1)
    batch = source.batch(np.arange(4))
    torch.manual_seed(0)
    plain = GPT(named("nano", style, layers=2, heads=2, width=32, context=CONTEXT, vocab=256))
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(3.0)
    exact = copy.deepcopy(plain).double()
    ours = plain(*batch) / int((batch[1] >= 0).sum())
    want, count = one_by_one(exact, batch)
    assert count == int((batch[1] >= 0).sum())
    assert ours.item() == pytest.approx(want.item(), rel=1e-5)
    mine, truth = gradients(plain, ours), gradients(exact, want)
    assert (mine - truth).abs().max() < 2e-5 * truth.abs().max(), (
        "a whole module in float32; a lost mask is off by 1e-1"
    )


@pytest.mark.parametrize("micro", [1, 2])
def test_a_trained_token_weighs_the_same_however_a_step_is_cut(micro: int, tmp_path: Path) -> None:
    corpus = rows(tmp_path / "a.jsonl")
    metrics = []
    for each in (0, micro):
        made = job.start(settings(name=f"micro{each}", micro=each, batch=5), (corpus,))
        made.run(say=lambda text: None)
        metrics.append(read_metrics(made.folder))
    batch = made.source.batch(np.arange(5))
    counts = (batch[1] >= 0).sum(1)
    assert counts.min() < 0.8 * counts.max(), "a mean over micro-batches would be another number"
    for one, two in zip(*metrics):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp=2", "fsdp=2", "tp=2", "pp=2"])
def test_every_mesh_trains_the_same_tokens_as_one_process(mesh: str, tmp_path: Path) -> None:
    corpus = rows(tmp_path / "a.jsonl")
    flags = [
        "--sft",
        "--layers",
        "2",
        "--heads",
        "2",
        "--width",
        "32",
        "--context",
        "64",
        "--steps",
        "3",
        "--batch",
        "5",
    ]
    flags += ["--micro", "1", "--sample", "0", "--threads", "1", "--device", "cpu", "--quiet", "--lr", "1e-2"]
    assert cli.main(["train", corpus, *flags, "--name", "one"]) == 0
    assert cli.main(["train", corpus, *flags, "--name", "many", "--mesh", mesh]) == 0
    one, many = (read_metrics(Path("runs") / name) for name in ("one", "many"))
    assert [r["step"] for r in one] == [r["step"] for r in many] == [1, 2, 3]
    for a, b in zip(one, many):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert one[-1]["val_loss"] == pytest.approx(many[-1]["val_loss"], rel=1e-4)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_stopped_run_goes_on_bit_for_bit(lora: int, tmp_path: Path) -> None:
    corpus = rows(tmp_path / "a.jsonl")
    job.start(settings(name="base"), (corpus,)).run(say=lambda text: None)
    options = {
        "init": "base",
        "steps": 4,
        "lora_rank": lora,
        "dropout": 0.1,
        "layers": None,
        "heads": None,
        "width": None,
    }
    whole = job.start(settings(name="whole", **options), (corpus,))
    whole.run(say=lambda text: None)
    part = job.start(settings(name="part", **options), (corpus,))
    step = part.trainer.train_step

    def stop() -> None:
        step()
        if part.trainer.step == 2:
            part.trainer.stop = "signal SIGINT"

    part.trainer.train_step = stop  # type: ignore[method-assign]
    part.run(say=lambda text: None)
    config, names = job.read_config(part.folder)
    again = job.resume(part.folder, config, names, other_data=False, say=lambda text: None)
    again.run(say=lambda text: None)
    saved = [checkpoint.Stored(checkpoint.newest(run.folder, print), "model").load() for run in (whole, again)]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        assert torch.equal(tensor, saved[1][name]), name


@pytest.mark.slow
def test_sft_equals_trl(tmp_path: Path) -> None:
    """The same rows through TRL's SFTTrainer: its loss and gradients, of a model that is this one exported."""
    trl = pytest.importorskip("trl", minversion="1.16", reason="trl (of the extra dev) is not installed")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    found = job.read_data((rows(tmp_path / "a.jsonl"),), settings().data, CONTEXT)
    batch = TokenSource(found, CONTEXT, 1).batch(np.arange(3))
    torch.manual_seed(0)
    plain = GPT(named("nano", "llama", layers=2, heads=2, width=32, context=CONTEXT, vocab=256, eps=1e-5))
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(3.0)
    theirs = exported(plain, tmp_path / "hf", transformers)
    sequences = []
    for inputs, targets, documents in zip(*batch):
        for number in documents.unique():
            own, wanted = inputs[documents == number], targets[documents == number]
            if (wanted >= 0).any():
                ids = [*own.tolist(), int(wanted[-1]) if wanted[-1] >= 0 else 0]
                sequences.append({"input_ids": ids, "labels": [-100, *wanted.tolist()]})
    options = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=len(sequences), report_to=[], use_cpu=True, bf16=False,
        max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        gradient_checkpointing=False, loss_type="nll",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=theirs,
        args=options,
        train_dataset=datasets.Dataset.from_list(sequences),
        processing_class=tokenizer(transformers),
    )
    collated = trainer.data_collator([dict(one) for one in sequences])
    theirs.train()
    loss = trainer.compute_loss(theirs, dict(collated), num_items_in_batch=None)
    ours = plain(*batch) / int((batch[1] >= 0).sum())
    assert ours.item() == pytest.approx(loss.item(), abs=1e-5)
    ours.backward()
    loss.backward()
    compared = {
        "model.embed_tokens.weight": plain.embed.weight,
        "model.norm.weight": plain.norm.weight,
        "model.layers.0.self_attn.o_proj.weight": plain.blocks[0].attn.out.weight,
        "model.layers.1.mlp.down_proj.weight": plain.blocks[1].mlp.down.weight,
    }
    named_theirs = dict(theirs.named_parameters())
    for name, mine in compared.items():
        assert torch.allclose(mine.grad, named_theirs[name].grad, atol=1e-5, rtol=1e-4), name


def exported(model: GPT, folder: Path, transformers: Any) -> Any:
    """The model as transformers' Llama."""
    from fastlm.train import export

    c = model.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.mlp_width, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.heads, max_position_embeddings=c.context, rms_norm_eps=c.eps,
        tie_word_embeddings=True, attention_bias=False, pad_token_id=None, eos_token_id=0, bos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).float()
    state = {}
    own = {n: t.detach() for n, t in model.state_dict().items()}
    for ours, theirs, cut, _ in export._names(c, "llama"):
        parts = own[ours].split(cut) if cut else [own[ours]]
        state.update(zip(theirs, parts))
    missing, unexpected = made.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return made


def tokenizer(transformers: Any) -> Any:
    from tokenizers import Tokenizer, models

    made = Tokenizer(
        models.WordLevel({"<|endoftext|>": 0, **{f"t{i}": i for i in range(1, 256)}}, unk_token="<|endoftext|>")
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|endoftext|>", pad_token="<|endoftext|>", bos_token="<|endoftext|>"
    )


def test_what_a_run_of_sft_measures_and_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = rows(tmp_path / "a.jsonl")
    (tmp_path / "book.txt").write_text("a plain text\n" * 40)
    base = [
        "--layers",
        "1",
        "--heads",
        "2",
        "--width",
        "32",
        "--context",
        "64",
        "--steps",
        "2",
        "--sample",
        "0",
        "--quiet",
    ]
    base += ["--threads", "1", "--device", "cpu"]
    assert cli.main(["train", corpus, "--sft", "--name", "run", "--val", "book=book.txt", *base]) == 0
    out, err = capsys.readouterr()
    assert "starts from random weights" in err
    assert "tokens are trained on" in out
    assert "for comparison" not in out, "what counts all text is no measure of answers alone"
    val = json.loads(Path("runs/run/result.json").read_text())["val"]
    found = job.read_data((corpus,), settings().data, 64)[0]
    part = found.manifest["val"]
    assert val["val_tokens"] == part["targets"]
    ratio = part["targets"] / part["target_bytes"] / math.log(2)
    assert val["val_bpb"] == pytest.approx(val["val_loss"] * ratio)
    assert val["val_book_loss"] > 0
    saved = json.loads(Path("runs/run/config.json").read_text())["config"]["data"]
    assert json.loads(saved["chat_template"]) == {"kind": "plain"}
    assert cli.main(["eval", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(val["val_loss"], rel=1e-4)
    for other in (["--fork", "run", "--no-sft"], ["--resume", "run", "--steps", "3", "--no-sft"]):
        assert cli.main(["train", *other, "--no-quiet"]) == 2
        assert "--sft" in capsys.readouterr().err


def test_a_text_is_refused_before_a_folder_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.txt").write_text("a\n")
    assert cli.main(["train", "book.txt", "--sft", "--device", "cpu"]) == 2
    assert "book.txt is a text, and --sft trains on rows" in capsys.readouterr().err
    assert not Path("runs").exists()
    with pytest.raises(InputError, match="name a CORPUS"):
        job.start(settings(), ())
