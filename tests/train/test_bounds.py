"""Every flag of every command refuses what it cannot be: in one sentence that names it, before anything is read."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from fastlm.bench.__main__ import RANGES
from fastlm.cli import data as data_command
from fastlm.cli import flags
from fastlm.cli.main import COMMANDS
from fastlm.cli.main import main as cli
from fastlm.data import InputError
from fastlm.data.augment import Augment
from fastlm.data.bounds import COUNT, SEED, Range, flag
from fastlm.data.clean import CleanOptions
from fastlm.train import Config
from fastlm.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from fastlm.train.optim import rate

GROUPS = (ModelConfig, DataConfig, OptimConfig, RunConfig)
FREE = {
    "init",
    "tokenizer",
    "field",
    "separator",
    "val",
    "name",
    "out",
    "device",
    "mesh",
    "wandb",
    "lora_targets",
    "chat_template",
    "prune",
    "shapes",
    "carbon",
    "when",
    "deadline",
    "fold",
}
WHOLE = Range(1, COUNT)
OWN: dict[str, dict[str, Range]] = {  # of the commands whose flags are arguments of a function
    "generate": {
        "tokens": Range(0, COUNT), "num": WHOLE, "temperature": Range(0), "top_k": Range(0, COUNT),
        "top_p": Range(above=0, high=1), "min_p": Range(0, 1), "seed": Range(*SEED),
        "redraw": Range(0, COUNT),
    },
    "data prepare": {"context": WHOLE},
    "data show": {"context": WHOLE, "seed": Range(*SEED)},
    "data tasks": {"n": WHOLE, "seed": Range(*SEED)},
    "data labels": {"below": Range(0, 2)},
    "data card": {"dedup": Range(0, 1), "workers": WHOLE, "seed": Range(*SEED)},
    "compress": {"samples": WHOLE, "seed": Range(*SEED), "heal": Range(0, COUNT), "heal_lr": Range(above=0)},
    "energy": {"hours": Range(above=0, high=1e6), "restart": Range(0, 1e6)},
    "data filter": {"precision": Range(above=0, high=1), "seed": Range(*SEED)},
    "inspect": {"layer": Range(0, COUNT), "head": Range(0, COUNT), "steps": Range(1, 1024)},
    "review": {
        "judges": Range(0, COUNT), "n": WHOLE, "each": WHOLE, "tokens": WHOLE, "temperature": Range(0), "seed": Range(*SEED),
        "port": Range(0, 65535),
    },
    "plan": {"devices": Range(1, 65536), "memory": Range(0)},
    "train": {"folds": Range(2, COUNT), "fractions": Range(above=0, high=1)},
    "bench": RANGES,
    "data clean": {}, "data augment": {}, "eval": {}, "export": {"outputs": WHOLE}, "soup": {}, "runs": {}, "compare": {},
    "data pairs": {},
}  # fmt: skip
HELD: dict[str, tuple[type, ...]] = {  # and those that hold dataclasses
    "train": GROUPS, "plan": GROUPS, "data prepare": (DataConfig,), "data show": (DataConfig,), "data clean": (CleanOptions,),
    "data augment": (Augment,),
}  # fmt: skip
PLACES = {  # what each must be given besides
    "review": ["none"], "export": ["none"],
    "generate": ["none"], "inspect": ["none"], "data prepare": ["none"], "data show": ["1", "none"], "train": ["none"],
    "compress": ["none", "--prune", "0.5"], "energy": ["none", "--deadline", "1h", "--hours", "1"],
    "data filter": ["none", "--out", "out"],
    "data tasks": ["none", "--out", "out"], "data labels": ["none", "--out", "out"], "data card": ["none"],
    "data clean": ["none", "--out", "out"], "data augment": ["none", "--out", "out.jsonl"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def numbers(*groups: type) -> dict[str, tuple[Range, bool]]:
    """(range, whether a whole number) of each flag that is a number."""
    found = {}
    for group in groups:
        kinds = get_type_hints(group)
        for one in dataclasses.fields(group):
            if "range" in one.metadata:
                found[one.name] = one.metadata["range"], "int" in str(kinds[one.name])
    return found


def function_of(command: str) -> Callable[..., Any]:
    """The function whose arguments are the flags of a command, by what it hands to `flags.call`."""
    found: list[Callable[..., Any]] = []

    def call(function: Callable[..., Any], *args: Any) -> Any:
        found.append(function)
        raise InputError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "call", call)
        cli(command.split())
    return found[0]


def wrong(allowed: Range, whole: bool, draw: random.Random) -> list[str]:
    """Numbers just outside of a range, and one far outside on either side."""
    out: list[Any] = []
    for edge, step in ((allowed.low, -1), (allowed.high, 1)):
        if edge is not None:
            out += (
                [edge + step, edge + step * draw.randrange(2, 10**6)] if whole else [math.nextafter(edge, step * 9e99)]
            )
    out += [e for e in (allowed.above, allowed.below) if e is not None and not whole]
    out += [10**20, -(10**20)] if whole else [float("nan"), float("inf"), -float("inf")]
    return [str(value) for value in out if value not in allowed]


def refused(words: list[str], name: str, capfd: pytest.CaptureFixture[str]) -> None:
    code = cli(words)
    out, err = capfd.readouterr()
    assert code == 2, (words, out, err)
    assert err.startswith(f"fastlm {words[0]}: {flag(name)} must be "), (words, err)
    assert len(err.strip().splitlines()) == 1, err


def test_every_flag_is_free_a_choice_a_switch_or_has_a_range() -> None:
    for group in GROUPS:
        kinds = get_type_hints(group)
        for one in dataclasses.fields(group):
            known = one.name in FREE or "range" in one.metadata or kinds[one.name] in (bool, bool | None)
            assert known or get_origin(kinds[one.name]).__name__ == "Literal", (
                f"{one.name}: bounded(...) gives its range"
            )


@pytest.mark.parametrize("command", HELD)
def test_numbers_outside_their_range_are_refused_by_name(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is read before: the corpus that is named does not exist. Each flag with one wrong value, drawn by chance."""
    draw = random.Random()
    seed = draw.randrange(2**32)
    draw.seed(seed)
    print("seed", seed)
    for name, (allowed, whole) in numbers(*HELD[command]).items():
        value = draw.choice(wrong(allowed, whole, draw))
        values = [value, "0.5"] if name == "betas" else [value]
        refused([*command.split(), *PLACES.get(command, []), flag(name), *values], name, capfd)


@pytest.mark.parametrize("command", sorted(set(OWN) - {"bench"}))
def test_every_number_of_every_command_is_walked(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    function = function_of(command)
    kinds = {name: kind for name, kind in get_type_hints(function).items() if name != "return"}
    own = {name for name, kind in kinds.items() if {int, float} & {kind, *get_args(kind)}}
    place = {"n"} if command == "data show" else set()  # no flag; it is held below, among the texts
    assert own - place == set(OWN[command])
    held = {kind for kind in kinds.values() if dataclasses.is_dataclass(kind)}
    assert held == set(HELD.get(command, ()))
    for group in held:
        found = {name for name, kind in get_type_hints(group).items() if {int, float} & {kind, *get_args(kind)}}
        assert found <= set(numbers(group)), group


def test_every_command_is_walked() -> None:
    held = {name for name in COMMANDS if name not in ("data", "doctor")} | {
        f"data {name}" for name in ("prepare", "show", *data_command.OTHERS)
    }
    assert held == set(OWN) | set(HELD)


@pytest.mark.parametrize("command", OWN)
def test_numbers_of_the_other_commands_too(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    for name, allowed in OWN[command].items():
        whole = isinstance(allowed.high, int) and allowed.high > 1
        for value in wrong(allowed, whole, random.Random(1)):
            refused([*command.split(), *PLACES.get(command, []), f"{flag(name)}={value}"], name, capfd)


def test_every_wrong_value_of_every_field_is_refused_in_python() -> None:
    for group in GROUPS:
        kinds = get_type_hints(group)
        for one in dataclasses.fields(group):
            values: list[Any] = []
            if "range" in one.metadata:
                whole = "int" in str(kinds[one.name])
                values = [(int if whole else float)(v) for v in wrong(one.metadata["range"], whole, random.Random(2))]
                values = [(v, 0.5) if one.name == "betas" else (v,) if one.name == "weights" else v for v in values]
            elif get_origin(kinds[one.name]).__name__ == "Literal" if get_origin(kinds[one.name]) else False:
                values = ["none of them"]
                assert values[0] not in get_args(kinds[one.name])
            for value in values:
                config = Config()
                owner = next(g for g in (config.model, config.data, config.optim, config.run) if isinstance(g, group))
                setattr(owner, one.name, value)
                with pytest.raises(InputError, match=rf"^{flag(one.name)} "):
                    config.check()


@pytest.mark.parametrize("words", [
    ["train", "none", "--device", "tpu"], ["train", "none", "--mesh", "dp=0"], ["train", "none", "--mesh", "dp=99999999999"],
    ["train", "none", "--val", "x"], ["train", "none", "--val", "a=b", "a=c"], ["train", "none", "--name", "a/b"],
    ["train", "none", "--lora-rank", "2"], ["train", "none", "--spike", "0.5"],
    ["train", "none", "--patience", "2", "--eval-every", "0"], ["generate", "none", "--prompt", "caf\udce9"],
    ["train", "none", "--compile", "--recompute", "full"], ["train", "none", "--recompute", "half", "--compile"],
    ["data", "show", "--", "-1"], ["data", "show", "9" * 20],
])  # fmt: skip
def test_texts_that_cannot_be_are_refused_by_name(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli(words) == 2
    err = capfd.readouterr().err
    name = next((w for w in words if w.startswith("--") and len(w) > 2), "number")
    assert name in err, err
    assert len(err.strip().splitlines()) == 1, err


def test_a_tokenizer_that_cannot_be_is_refused_before_the_corpus_is_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["fastlm.data.prepare"], "_Corpus", None)  # nothing reads
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("text\n" * 1000)
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "latin.json").write_bytes(b'"\xe9"')
    for words, message in (
        (["--tokenizer", "words"], "not bytes, chars, bpe"),
        (["--tokenizer", "no.json"], "tokenizer.json cannot be read"),
        (["--tokenizer", "latin.json"], "not UTF-8"),
        (["--tokenizer", "bpe", "--vocab", "256"], "--vocab must be at least 257"),
    ):
        assert cli(["data", "prepare", "a.txt", *words]) == 2
        assert message in capfd.readouterr().err


def test_a_warm_up_and_a_cooldown_share_the_steps() -> None:
    """The rate moves by no more than its two slopes allow, reaches its peak where it can, and what is cut is said."""
    for warmup in (None, 0, 1, 30, 50, 99, 100, 150):
        for cooldown in (0.0, 0.2, 0.9, 1.0):
            o = OptimConfig(steps=100, warmup=warmup, schedule="wsd", cooldown=cooldown)
            config = Config(optim=o)
            config.check()
            rates = [rate(o, step) for step in range(100)]
            slope = max(1 / max(o.rise, 1), 1 / max(o.fall, 1)) + 1e-12
            assert all(abs(a - b) <= slope for a, b in itertools.pairwise(rates))
            assert max(rates) == pytest.approx(min(1.0, 100 / max(o.rise, 1)))
            assert bool(config.notes()) == (o.rise >= 100 or o.rise + 100 * cooldown > 100)
    for schedule, steps, warmup, cooldown in itertools.product(
        ("constant", "linear", "cosine", "wsd"), (1, 2, 3, 9), (0, 1, 2, 8), (0.0, 0.2, 0.5, 1.0)
    ):
        same = {"steps": steps, "warmup": warmup, "schedule": schedule, "cooldown": cooldown}
        high, low = (OptimConfig(**same, min_lr=m) for m in (1.0, 0.0))  # type: ignore[arg-type]
        assert high.falls == any(rate(high, i) != rate(low, i) for i in range(steps)), same
    for steps in (1, 2, 50, 499, 500, 2930):
        o = OptimConfig(steps=steps)
        assert max(rate(o, step) for step in range(steps)) == 1.0
        assert o.rise == (100 if steps >= 500 else steps // 5)


def test_shared_memory_is_blamed_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full /dev/shm is not the cache's fault, and a corpus that goes missing neither."""
    from fastlm.data import Options, prepare

    (tmp_path / "a.txt").write_text("text\n" * 5000)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastlm.data.workers.ProcessPoolExecutor", full)
    with pytest.raises(InputError, match=r"/dev/shm.*--workers 1"):
        prepare(("a.txt",), Options(workers=2), cache=tmp_path / "cache")


def test_a_config_json_that_tells_no_model_is_one_sentence(tmp_path: Path) -> None:
    from fastlm.train.export import from_hf

    whole = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 4, "vocab_size": 16}
    for field in whole:
        if field != "model_type":
            with pytest.raises(InputError, match=f"config.json lacks the field '{field}'"):
                from_hf({k: v for k, v in whole.items() if k != field}, {}, tmp_path)
    for wrong_value in ({"n_head": 3}, {"n_head": 0}, {"n_embd": "8"}, {"n_head": None}):
        with pytest.raises(InputError, match=r"config\.json"):
            from_hf(whole | wrong_value, {}, tmp_path)
    with pytest.raises(InputError, match="lacks the tensor"):
        from_hf(whole, {}, tmp_path)


def test_layers_that_config_json_does_not_promise_are_refused(tmp_path: Path) -> None:
    from fastlm.models.gpt import GPT, GPTConfig
    from fastlm.train.export import Source, from_hf, to_hf

    for style in ({}, {"norm": "rms", "position": "rotary", "mlp": "swiglu", "bias": False}):
        shape = GPTConfig(layers=2, heads=2, width=8, context=4, vocab=16, **style)  # type: ignore[arg-type]
        config, tensors = to_hf(Source(shape, GPT(shape).state_dict(), None))
        assert from_hf(config, tensors, tmp_path)[0].layers == 2
        older = {
            "transformer.h.0.attn.bias": torch.ones(1),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1),
        }
        from_hf(config, tensors | older, tmp_path)
        count = "n_layer" if not style else "num_hidden_layers"
        with pytest.raises(InputError, match=r"tensors that its config.json does not promise.*\.1\."):
            from_hf(config | {count: 1}, tensors, tmp_path)
