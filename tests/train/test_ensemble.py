"""Ensembles: the mean of probabilities, against float64; `fastlm eval --ensemble` and `fastlm generate` of several runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from fastlm.cli.main import main
from fastlm.models.ensemble import Ensemble
from fastlm.models.gpt import GPT, GPTConfig, packed
from fastlm.train import job
from test_train import _own_place, book, tiny  # noqa: F401
from torch import Tensor

SHAPES = {
    "llama": {"norm": "rms", "position": "rotary", "mlp": "swiglu", "bias": False},
    "gpt2": {},
}


def members(count: int = 3, vocab: tuple[int, ...] = (40, 40, 48), **changes: object) -> list[GPT]:
    """Models whose logits are far from uniform, of a generator of their own."""
    draw = torch.Generator().manual_seed(17)
    made = []
    for size in vocab[:count]:
        model = GPT(GPTConfig(layers=2, heads=2, width=16, context=12, vocab=size, **changes)).eval()  # type: ignore[arg-type]
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=draw) * (0.4 if p.dim() > 1 else 1.0))
        made.append(model)
    return made


def mean_loss(models: list[GPT], tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> float:
    """Sum of -log of the mean probability of the targets, in float64."""
    total = torch.zeros(targets.shape, dtype=torch.float64)
    for model in models:
        logits = model(tokens, documents=documents).double()
        total += logits.softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return float(-(total / len(models)).log().masked_fill(targets < 0, 0.0).sum())


def batch() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(40, (3, 12), generator=draw)
    targets = torch.randint(40, (3, 12), generator=draw)
    targets[torch.rand(3, 12, generator=draw) < 0.3] = -100
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [0] * 2 + [1] * 4 + [2] * 6])
    return tokens, targets, documents


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("pack", [False, True])
def test_the_loss_is_that_of_the_mean_of_probabilities(shape: str, pack: bool) -> None:
    models = members(**SHAPES[shape])
    tokens, targets, documents = batch()
    more = (documents,) if pack else ()
    with torch.no_grad():
        made = Ensemble(models, 40)
        found = made(tokens, targets, *more)
        assert float(found) == pytest.approx(mean_loss(models, tokens, targets, *more), rel=1e-6)
        alone = [mean_loss([m], tokens, targets, *more) for m in models]
        assert made.losses.tolist() == pytest.approx(alone, rel=1e-6)
        assert float(found) < sum(alone) / len(alone)  # Jensen, strictly: they differ
        made(tokens, targets, *more)
        assert made.losses.tolist() == pytest.approx([2 * x for x in alone], rel=1e-6)  # sums since it was made
        if pack:  # the borders matter to this text
            assert mean_loss(models, tokens, targets) != pytest.approx(float(found), rel=1e-3)
            assert bool(packed(documents)[1][0, 0, 6, 2]) is False


def test_a_model_beside_its_copies_is_itself() -> None:
    (model,) = members(1)
    tokens, targets, _ = batch()
    with torch.no_grad():
        assert float(Ensemble([model] * 3, 40)(tokens, targets)) == pytest.approx(
            float(model(tokens, targets)), rel=1e-6
        )


@pytest.mark.parametrize("shape", list(SHAPES))
def test_it_generates_by_the_mean_of_probabilities_with_a_cache_of_each(shape: str) -> None:
    models = members(**SHAPES[shape])
    seen: list[Tensor] = []

    def choose(logits: Tensor) -> Tensor:
        seen.append(logits)
        return logits.argmax(-1)

    start = torch.tensor([[3, 7, 1]])
    found = Ensemble(models, 40).generate(start, 9, choose)
    assert found.shape == (1, 12)
    for step, logits in enumerate(seen):
        with torch.no_grad():
            each = [m(found[:, : 3 + step])[:, -1, :40].double().softmax(-1) for m in models]
        truth = torch.stack(each).mean(0)
        assert torch.allclose(logits.double().exp(), truth, rtol=1e-4, atol=1e-7)
        assert int(truth.argmax()) == int(found[0, 3 + step])


def test_members_of_other_contexts_read_on_past_the_least() -> None:
    long, short = members(1)[0], members(2)[1]
    other = GPT(GPTConfig(layers=1, heads=2, width=16, context=6, vocab=40)).eval()
    made = Ensemble([long, other, short], 40)
    assert made.context == 6
    assert made.generate(torch.tensor([[1, 2]]), 30, lambda logits: logits.argmax(-1)).shape == (1, 32)


def test_what_no_ensemble_can_be_is_refused() -> None:
    with pytest.raises(ValueError, match="members must be one model at least"):
        Ensemble([], 40)
    with pytest.raises(ValueError, match=r"vocab must be from 1 to 40.*it is 48"):
        Ensemble(members(), 48)


# ------------------------------------------------------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def runs(book: str, trained: Path) -> str:  # noqa: F811
    """Three runs that differ in their seeds, and one of another tokenizer; made once."""
    if not (trained / "runs").exists():
        for name, changes in {"a": {}, "b": {"seed": 2}, "c": {"seed": 3}, "letters": {"tokenizer": "chars"}}.items():
            job.start(tiny(name=name, steps=30, lr=1e-2, **changes), (book,)).trainer.fit()
        shutil.copytree("runs", trained / "runs")
    else:
        shutil.copytree(trained / "runs", "runs")
    return book


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    assert main(["eval", *words, "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("other", [False, True])
def test_eval_of_an_ensemble_tells_each_and_the_whole(
    runs: str, other: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    text = []
    if other:
        Path("other.txt").write_text(Path(runs).read_text()[:5000].upper())
        text = ["other.txt"]
    found = told(capsys, "a", "b", "c", *text, "--ensemble")
    alone = [told(capsys, name, *text) for name in "abc"]
    assert [one["run"] for one in found["members"]] == found["runs"] == [f"runs/{name}" for name in "abc"]
    for one, own in zip(found["members"], alone, strict=True):
        assert one["loss"] == pytest.approx(own["loss"], rel=1e-5)
        assert one["bits_per_byte"] == pytest.approx(own["bits_per_byte"], rel=1e-5)
    assert (found["tokens"], found["bytes"]) == (alone[0]["tokens"], alone[0]["bytes"])
    assert found["loss"] < sum(one["loss"] for one in alone) / 3
    assert main(["eval", "a", "b", *text, "--ensemble", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["runs/a", "runs/b", "the ensemble of 2"]


def test_generate_of_several_runs_is_of_their_mean(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "alpha", "--tokens", "20", "--device", "cpu"]
    texts = {}
    for names in (["a"], ["b"], ["a", "b", "c"]):
        for temperature in ("0", "1"):
            assert main(["generate", *names, *words, "--temperature", temperature]) == 0
            texts["".join(names), temperature] = capsys.readouterr().out
    assert all(text.startswith("alpha") and len(text) >= 20 for text in texts.values())
    models = [job.load(Path("runs") / name, "cpu")[0] for name in "abc"]
    tokens = torch.tensor([list(b"alpha")])
    while tokens.shape[1] < 5 + 10:  # within the context of 16, where no cache starts anew
        with torch.no_grad():
            mean = torch.stack([m(tokens)[:, -1].double().softmax(-1) for m in models]).mean(0)
        tokens = torch.cat((tokens, mean.argmax(-1)[:, None]), 1)
    assert texts["abc", "0"].encode()[: tokens.shape[1]] == bytes(tokens[0].tolist())


def test_what_cannot_be_together_is_one_sentence(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (["eval", "a", "letters", "--ensemble"], "runs/a and runs/letters have different tokenizers (bytes; chars of "),
        (["generate", "a", "b", "letters"], "runs/a and runs/letters have different tokenizers (bytes; chars of "),
        (["eval", "a", "--ensemble"], "needs two runs or more; it was given 1"),
        (["eval", "--ensemble"], "needs two runs or more; it was given 0"),
        (["eval", "a", "b", "a", "--ensemble"], "takes each run once; runs/a is given 2 times"),
        (["generate", "a", "b", "--chat"], "--chat is a conversation with one run; it was given 2"),
        (["generate", "a", "a"], "takes each run once; runs/a is given 2 times"),
        (["eval", "a", "d", "--ensemble"], "there is no run d"),
        (["eval", "a", "runs/b"], "runs/b is a run, not a text: give --ensemble"),
    ):
        assert main([*words, "--device", "cpu"]) == 2, words
        err = capsys.readouterr().err
        assert says in err, (words, err)
        assert len(err.strip().splitlines()) == 1


def test_runs_of_other_data_are_named(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    job.start(tiny(name="other", steps=2, val_fraction=0.3), (runs,)).trainer.fit()
    capsys.readouterr()
    assert main(["eval", "a", "other", "--ensemble", "--device", "cpu"]) == 0
    assert "runs/other: other data than those of runs/a" in capsys.readouterr().err
    assert main(["eval", "a", "b", "--ensemble", "--device", "cpu"]) == 0
    assert "other data" not in capsys.readouterr().err


def test_a_mean_of_runs_that_learned_from_pairs_asks_for_a_text(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = ({"prompt": "", "chosen": f"alpha {i}", "rejected": f"beta {i}"} for i in range(60))
    Path("pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pairs))
    for name, seed in (("p", 1), ("q", 2)):
        given = tiny(name=name, seed=seed, init="runs/a", dpo=True, steps=2, batch=2)
        for field in ("layers", "heads", "width", "context"):
            setattr(given.model, field, None)
        job.start(given, ("pairs.jsonl",)).trainer.fit()
    capsys.readouterr()
    assert main(["eval", "p", "q", "--ensemble", "--device", "cpu"]) == 2
    assert "runs/p learned from pairs" in capsys.readouterr().err
    assert told(capsys, "p", "q", runs, "--ensemble")["loss"] > 0
