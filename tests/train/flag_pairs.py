"""Pairs of flags of `fastlm train`, made from the configuration's dataclasses, and what a run of two steps does with each.

A pair is sound when it trains, or is refused by one sentence that names the flag; when both flags are refused together and
neither alone, by both names. A flag that changes a run alone and nothing beside another one is named in a warning then.

python flag_pairs.py [PART/PARTS [SEED [FLAG ...]]]        walks all pairs, or a share of them, in a scratch folder
python flag_pairs.py --ranks MESH PORTS FLAG ...  is one rank of two, for the pairs of a mesh with each flag
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from fastlm.cli import main as cli
from fastlm.cli import train as command
from fastlm.data.bounds import Range, flag
from fastlm.train import Config, callbacks, measuring, report, waiting
from fastlm.train import ranks as ranks_of
from fastlm.train.files import read_metrics

# The run that each flag changes: two layers, two steps, and as much of the rest as shows within them.
BASE: dict[str, Any] = {
    "layers": 2, "heads": 2, "width": 32, "context": 16, "steps": 2, "batch": 4, "eval_every": 1, "eval_tokens": 4096,
    "save_every": 1, "sample": 4, "threads": 1, "device": "cpu", "quiet": True, "name": "run",
    "clip": 0.01,  # shorter than every gradient, so that it has a say beside any other flag
}  # fmt: skip
CLOCKS = {"tokens_per_s", "stall", "seconds", "mfu", *measuring.CLOCKS}  # what no two runs have alike
# Values that no type tells; where a type tells some, these are more.
VALUES: dict[str, tuple[Any, ...]] = {
    "size": ("1B",), "val_fraction": (0.5,), "width": (48,), "rows": (1, 300), "vocab": (300,), "steps": (4,), "spike": (1.5,),
    "eval_tokens": (64,),
    "init": ("first",), "head_size": (8,), "lora_targets": (("qkv",),),
    "tokenizer": ("chars", "bpe", "first.json"), "field": ("body",), "separator": ("\\n",), "weights": ((1.0, 3.0),),
    "val": (("more=more.txt",),), "betas": ((0.5, 0.5),), "prune": ("0.5", "2:4"),
    "fold": ("1/2",), "shapes": ("2/2/96,1/1/32",), "chat_template": ("other.jinja",),
    "name": ("other",), "out": ("elsewhere",), "device": ("auto",), "mesh": ("dp=1",), "wandb": ("project",),
    "carbon": ("381",), "when": ("curve.csv",), "deadline": ("1h",),
}  # fmt: skip
ALONE = {
    "size",
    "steps",
    "vocab",
    "spike",
    "eval_tokens",
    "val_fraction",
}  # their types' values would tell nothing more
MODES = {
    "resume": ("first",),
    "fork": ("first",),
    "other_data": (True,),
}  # flags of the command that no dataclass holds
Pair = tuple[tuple[str, Any], ...]


def groups(config: Config) -> list[Any]:
    return [config.model, config.data, config.optim, config.run]


def owner(config: Config, name: str) -> Any:
    return next(group for group in groups(config) if name in {f.name for f in dataclasses.fields(group)})


def base() -> Config:
    config = Config()
    for name, value in BASE.items():
        setattr(owner(config, name), name, value)
    return config


def numbers(allowed: Range, whole: bool, now: Any) -> list[Any]:
    """The least that a range allows, and a number near to what is there."""
    low, high = allowed.low, allowed.high if allowed.high is not None else allowed.below
    least = [] if low is None else [low]
    if whole:
        return [*least, (low or 0) + 2 if now is None else now + 1]
    if now:
        return [*least, now * 2 if high is None or now * 2 < high else now / 2]
    return [*least, (low or allowed.above or 0) + 0.5 * (high or 1)]


def values() -> dict[str, list[Any]]:
    """Of each flag the values that are walked, none of which is the base's."""
    start, found = base(), {}
    for group in groups(start):
        kinds = get_type_hints(type(group))
        for one in dataclasses.fields(group):
            now, kind, some = getattr(group, one.name), kinds[one.name], list[Any]()
            if get_origin(kind) is Literal:
                some = list(get_args(kind))
            elif kind in (bool, bool | None):
                some = [True, False]
            elif "range" in one.metadata and get_origin(kind) is not tuple:
                some = numbers(one.metadata["range"], "int" in str(kind), now)
            if one.name in ALONE:
                some = []
            some += VALUES.get(one.name, ())
            found[one.name] = [value for i, value in enumerate(some) if value != now and value not in some[:i]]
    return found | {name: list(given) for name, given in MODES.items()}


def pairs() -> list[Pair]:
    """Every value of every flag beside every value of every other one."""
    return [
        ((a, x), (b, y))
        for (a, some), (b, others) in itertools.combinations(values().items(), 2)
        for x in some
        for y in others
    ]


# ------------------------------------------------------------------------------------------------------------- one run


@dataclasses.dataclass
class Outcome:
    code: int
    out: str
    err: str
    print: str = ""  # a hash of all that the run computed and kept
    fault: str = ""

    @property
    def refused(self) -> bool:
        return self.code == 2


def prepare() -> None:
    """The texts of the walk, and a finished run to start from, in the current folder."""
    draw = random.Random(0)
    for name in ("a", "b", "more"):
        text = (" ".join(draw.choice(("alpha", "beta", "gamma", "delta")) for _ in range(9)) for _ in range(150))
        Path(f"{name}.txt").write_text("\n".join(text) + "\n")
    for name in ("a", "b"):
        pair = (
            [{"role": role, "content": draw.choice("pqrs") * 3} for role in ("user", "assistant")] for _ in range(60)
        )
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in pair))
        pair = (
            {"prompt": "", "chosen": draw.choice("pqrs") * 3, "rejected": draw.choice("tuvw") * 2 + str(i)}
            for i in range(200)
        )
        Path(f"{name}-pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pair))
    Path("other.jinja").write_text("{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}a")
    config = base()
    config.run.name, config.data.tokenizer = "first", "bytes"
    assert _call(config, {}).code == 0
    shutil.move("runs/first", "kept")
    begin = int(time.time()) - 60
    Path("curve.csv").write_text("\n".join(f"{begin + 3600 * i},{100 + i}" for i in range(99)))
    from tokenizers import Tokenizer, models, pre_tokenizers

    byte = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate([*byte, "<|endoftext|>"])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save("first.json")


def _call(config: Config, options: dict[str, Any]) -> Outcome:
    given = {"resume": "", "fork": "", "other_data": False, "origin": None} | options
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    ending = {"sft": ".jsonl", "dpo": "-pairs.jsonl"}.get(config.data.rows, ".txt")
    corpus = (f"a{ending}", f"b{ending}")
    parse, command.parse = command.parse, lambda argv: (config, corpus, given)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.main(["train"])
            except BaseException:  # noqa: BLE001  what a test of all flags is for
                traceback.print_exc()
                code = 1
    finally:
        command.parse = parse
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        if config.run.compile:
            torch._dynamo.reset()
    return Outcome(code, out.getvalue(), err.getvalue())


def run(changes: Pair) -> Outcome:
    """What `fastlm train` does with these flags; of a run that trained, whether all is there and says one thing."""
    for folder in ("runs", "elsewhere"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree("kept", "runs/first")
    config, options = base(), dict[str, Any]()
    for name, value in changes:
        if name in ("resume", "fork"):
            config.run.name = "first" if name == "resume" else "run"
            config.optim.steps = max(config.optim.steps, 3)
            options |= {name: value, "origin": Path("runs/first")}
    if ("dpo", True) in changes:  # it needs a model to start from
        config.model.init = "first"
    for name, value in changes:
        if name == "other_data":
            options[name] = value
        elif name not in MODES:
            setattr(owner(config, name), name, value)
    given = copy.deepcopy(config)
    found = _call(config, options)
    folder = Path(config.run.out) / config.run.name
    if found.code == 0:
        with contextlib.suppress(OSError, ValueError, KeyError):
            found.print = fingerprint(folder)
        found.fault = trained_fault(folder, given, found, first=3 if "fork" in options else 1)
    elif found.refused:
        found.fault = refused_fault(folder, found, options)
    else:
        found.fault = f"exit status {found.code}: {found.err.strip().splitlines()[-1:]}"
    return found


def fingerprint(folder: Path) -> str:
    keep = [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_metrics(folder)]
    files = sorted(str(p.relative_to(folder.parent.parent)) for p in folder.rglob("*") if "events.out" not in p.name)
    last = max((folder / "checkpoints").glob("step-*"))
    body = [keep, files, (folder / "sample.txt").read_text(), json.loads((last / "state.json").read_text())["data"]]
    weights = (last / "model.safetensors").read_bytes()
    return hashlib.sha256(json.dumps(body).encode() + weights).hexdigest()


def trained_fault(folder: Path, config: Config, found: Outcome, first: int) -> str:
    if "Traceback" in found.out + found.err:
        return "a traceback beside success"
    rows = read_metrics(folder)
    if [row["step"] for row in rows] != list(range(first, config.optim.steps + 1)) and not config.run.patience:
        return f"{len(rows)} steps of {config.optim.steps}"
    if any(row["loss"] is None or not math.isfinite(row["loss"]) for row in rows):
        return "a loss that is not finite"
    for name in ("result.json", "report.html", "sample.txt", "config.json", "facts.json"):
        if not (folder / name).is_file():
            return f"no {name}"
    best = json.loads((folder / "result.json").read_text())["best"]
    if not best:
        return "no best step"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = cli.main(["eval", str(folder), "--device", "cpu", "--json"])
    if code:
        return f"cannot be evaluated: {out.getvalue().strip()}"
    again = json.loads(out.getvalue().strip().splitlines()[-1])["loss"]
    close = 1e-4 if config.run.dtype == "float32" else 1e-2
    if config.run.eval_tokens >= BASE["eval_tokens"] and not math.isclose(again, best["val_loss"], rel_tol=close):
        return f"eval finds a loss of {again}, the run {best['val_loss']}"
    return ""


def refused_fault(folder: Path, found: Outcome, options: dict[str, Any]) -> str:
    *notes, last = found.err.strip().splitlines() or [""]
    if not last.startswith("fastlm train: ") or any(line.startswith("fastlm train: ") for line in notes):
        return f"not one sentence: {found.err!r}"
    if "Traceback" in found.err:
        return "a traceback beside the sentence"
    if folder.exists() and not options.get("resume"):
        return f"refused ({last}), and the folder is there"
    return ""


# -------------------------------------------------------------------------------------------------------------- a pair


class Walk:
    """Runs pairs and says what is wrong with each; what a flag does alone is found out once."""

    def __init__(self) -> None:
        self.known: dict[Pair, Outcome] = {}

    def alone(self, *changes: tuple[str, Any]) -> Outcome:
        key = repr(changes)  # type: ignore[assignment]
        if key not in self.known:
            self.known[key] = run(changes)  # type: ignore[index]
        return self.known[key]  # type: ignore[index]

    def single(self, one: tuple[str, Any]) -> str:
        """What is wrong with a flag alone."""
        found = self.alone(one)
        if found.fault:
            return found.fault
        if found.refused and flag(one[0]) not in found.err:
            return f"refused without its name: {found.err.strip()}"
        if not found.refused and found.print == self.alone().print and one[0] not in UNSEEN:
            return "" if flag(one[0]) in found.err else "changes nothing, and nothing is said"
        return ""

    def pair(self, one: tuple[str, Any], two: tuple[str, Any]) -> str:
        """What is wrong with a pair, or ""."""
        found, first, second = run((one, two)), self.alone(one), self.alone(two)
        if found.fault:
            return found.fault
        names = [flag(name) if name not in MODES else "" for name, _ in (one, two)]
        if found.refused:
            if first.refused or second.refused:
                ours = [name for name, alone in zip(names, (first, second)) if alone.refused]
                return "" if any(name in found.err for name in ours) else f"refused for another: {found.err.strip()}"
            named = all(name in found.err or (name == "--dpo" and "--init" in found.err) for name in names)
            return "" if named else f"refused without both names: {found.err.strip()}"
        nothing = self.alone().print
        for mine, other, name in ((first, second, names[0]), (second, first, names[1])):
            told = name in found.err
            if name in ("--clip", "--kernels") and ("optimizer", "lion") in (one, two):
                continue  # its step is a sign, which no length and no last bit of a gradient changes
            if name == "--min-delta":
                continue  # has a say only where a second evaluation is better by less
            if frozenset((one, two)) in SAME:
                continue
            # the one step that a mode adds may be one in which a flag has no say
            if "" not in names and mine.print not in ("", nothing) and found.print == other.print and not told:
                return f"{name} is left out without a word"
        return ""


# Flags that change no number within two steps of a small model, each for a reason.
UNSEEN = {
    "pue", "carbon",  # stand in the report alone
    "quiet", "deterministic", "threads", "workers", "device", "nproc", "mesh",  # how, not what
    "schedule",  # the first of two steps is at the peak, whatever follows
    "size",  # every field of it is given
    "patience", "min_delta", "max_bad", "spike", "keep", "keep_every",  # need more steps, or worse ones
    "save_every",  # each evaluation finds a better model, and saves it
    "clip", "recompute", "micro", "kernels", "compile",  # equal to rounding, which may be none
    "tokenizer", "special_tokens", "field", "separator", "warmup", "bias", "tied", "kv_heads", "rows", "init",
}  # fmt: skip


# Pairs of which one asks for what the other one gives anyway.
SAME = {
    frozenset({("heads", 1), ("kv_heads", 1)}),  # one head has one key head
    frozenset({("context", 1), ("rope_base", 0.5)}),  # the only position is 0, which no base turns
    frozenset({("sft", True), ("packing", "documents")}),  # rows are packed as documents are
    frozenset({("dpo", True), ("packing", "documents")}),
    frozenset({("dpo", True), ("init", "first")}),  # pairs need a model to start from, which the walk gives them
    frozenset({("batch", 1), ("ramp", 1)}),  # a batch of one cannot start smaller
    frozenset({("style", "gpt2"), ("bias", True)}),  # that style has biases
    frozenset({("batch", 1), ("micro", 1)}),  # a batch of one is one part
}


def _train_here(config: Config, options: dict[str, Any], argv: list[str], count: int) -> int:
    """In the place of a process that waits, and whose child would not know the walk's flags: what that child does."""
    waiting.Waiter(config.run, None, True, config.optim.steps)  # refuses what it refuses
    ranks = ranks_of.SingleProcess()
    return command._train(config, ("a.txt", "b.txt"), options, ranks)


@contextlib.contextmanager
def quick(compiler: str = "aot_eager") -> Iterator[None]:
    """Nothing is drawn or synced, and `compiler` takes inductor's place: what is left of a run is what flags change."""
    saved = callbacks.draw, report.svg, os.fsync, torch.nn.Module.compile
    waits = command._wait
    callbacks.draw = lambda *args, **options: None  # type: ignore[assignment]
    report.svg = lambda *args, **options: "<svg></svg>"  # type: ignore[assignment]
    os.fsync = lambda handle: None  # type: ignore[assignment]
    command._wait = _train_here
    if compiler:
        torch.nn.Module.compile = lambda self: saved[3](self, backend=compiler)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        command._wait = waits
        callbacks.draw, report.svg, os.fsync, torch.nn.Module.compile = saved  # type: ignore[assignment,method-assign]


def main(argv: list[str]) -> int:
    part, parts = map(int, (argv[0] if argv else "1/1").split("/"))
    every = pairs()
    if only := argv[2:]:
        every = [(one, two) for one, two in every if one[0] in only or two[0] in only]
    random.Random(argv[1] if len(argv) > 1 else "0").shuffle(every)
    os.chdir(tempfile.mkdtemp())
    os.environ["FASTLM_CACHE"] = os.path.abspath("cache")
    torch.set_num_threads(1)
    walk, faults, began = Walk(), 0, time.monotonic()
    with quick():
        prepare()
        singles = [(name, value) for name, some in values().items() for value in some]
        for one in singles if part == 1 and not only else ():
            if why := walk.single(one):
                faults += 1
                print("FAULT", one, why, flush=True)
        mine = every[part - 1 :: parts]
        for i, (one, two) in enumerate(mine):
            if i % 200 == 0:
                print(f"{i} of {len(mine)} pairs, {time.monotonic() - began:.0f} s", flush=True)
            if why := walk.pair(one, two):
                faults += 1
                print("FAULT", one, two, why, flush=True)
    print(f"{len(mine)} pairs, {faults} faults")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
