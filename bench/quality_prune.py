"""What pruning costs in quality: ``python bench/quality_prune.py`` (15 minutes on two quiet cores; in parts by ``--only``).

The default job's model is trained on the default corpus, for ``--steps`` of its 2,930 steps. Copies of it are pruned to 50%,
to 70% and to 2:4 by magnitude, Wanda and SparseGPT, and each is healed (a run of ``--heal`` steps, masks held). "gradual" is
the same training anew with ``--prune`` (the cubic schedule; 2:4 at once), and the same healing after it; "sr-ste" is it with
``--prune 2:4 --prune-method sr-ste``, of the same steps. Beside them stand the dense model, and the dense model trained for as
many steps as healing takes. All perplexities are of the same validation tokens.

    python bench/quality_prune.py --only model        # trains the dense model into --keep: 1,800 steps
    python bench/quality_prune.py --only one-shot     # magnitude, Wanda, SparseGPT, without healing: no training
    python bench/quality_prune.py --only healed       # and with: 2,000 steps
    python bench/quality_prune.py --only gradual      # three trainings and healings, and one of SR-STE: 8,000 steps
    python bench/quality_prune.py --only smaller      # heads, channels or a layer removed, without healing and with: 600

All in all 12,400 steps of 1,024 tokens, which take 12 minutes at 17,000 tokens/s, and 34 measurements. ``--steps 2930
--heal 600 --tokens 65536`` is the whole default job and takes twice as long. The parts share runs and losses through
``--keep``, and a part that was stopped goes on where it was; the one that measures what was still missing writes the result.
``--run RUN`` takes a trained run in place of a new one. A tiny setting, which writes nothing but ``--keep``: ``--steps 60
--heal 10 --tokens 4096 --keep FOLDER --dry``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastlm import compress
from fastlm.bench.quality import Quality
from fastlm.models.gpt import GPT
from fastlm.train import compressing, export, job
from fastlm.train.compress_pruning import Prune, Shrink, parts
from fastlm.train.config import Config
from fastlm.train.healing import Heal

TARGETS = {"50%": "0.5", "70%": "0.7", "2:4": "2:4"}
METHODS = ("magnitude", "wanda", "sparsegpt")
SR_STE = "2:4"  # the target that SR-STE is for
SMALLER = ("heads:0.25", "channels:0.3", "layers:1")
PARTS = ("model", "one-shot", "healed", "gradual", "smaller")
BARS = {"50%": 0.5, "70%": 0.5, "2:4": 0.35}  # SparseGPT's increase of the loss against magnitude's
OF = ("fastlm.compress.prune", "fastlm.compress.shrink", "fastlm.compress.calibrate", "fastlm.compress.masks",
      "fastlm.train.pruning", "fastlm.train.sparsity", "fastlm.train.compress_pruning",
      "fastlm.train.healing", "fastlm.reference.prune_mask")  # fmt: skip
Found = dict[str, dict[str, Any]]  # by "method target" (and " healed"): loss, seconds, parameters


def config(args: argparse.Namespace, name: str, prune: str = "", method: str = "gradual") -> Config:
    made = Config()
    made.optim.steps, made.optim.prune, made.run.seed = args.steps, prune, args.seed
    made.optim.prune_method = method  # type: ignore[assignment]
    made.run.name, made.run.out = name, str(args.keep)
    made.run.eval_every = made.run.save_every = made.run.sample = 0
    made.run.eval_tokens, made.run.quiet = args.tokens, True
    return made


def trained(args: argparse.Namespace, name: str, *how: str) -> Path:
    """The folder of a run that has taken all its steps; one that is there already is taken."""
    folder: Path = args.keep / name
    if not (folder / "result.json").is_file():
        job.start(config(args, name, *how)).run(say=lambda line: None)
    return folder


class Measure:
    """Models made from the dense one, and their losses on the same tokens."""

    def __init__(self, args: argparse.Namespace, sources: str) -> None:
        self.args, self.file = args, args.keep / "losses.json"
        of = {"sources": sources, "run": args.run, **{k: vars(args)[k] for k in ("steps", "heal", "seed", "tokens")}}
        kept = json.loads(self.file.read_text()) if self.file.is_file() else {"of": of, "found": {}}
        if kept["of"] != of:
            raise SystemExit(f"{self.file} is of {kept['of']}, not of {of}: remove {args.keep}, or name another --keep")
        self.of, self.found = of, kept["found"]
        begin = time.monotonic()
        folder = Path(args.run) if args.run else trained(args, "dense")
        self.model, tokenizer = job.load(folder, "cpu")
        self.settings, corpus = job.read_config(folder)
        self.settings.run.eval_tokens, self.settings.run.quiet = args.tokens, True
        self.data = job.read_data(corpus, self.settings.data, self.model.config.context, kept=tokenizer)
        self.measure("dense", lambda: self.model, begin)

    def text(self, model: GPT) -> compressing.Text:
        return compressing.Text(Path("."), self.data, self.settings, model, samples=64, seed=self.args.seed)

    def measure(self, name: str, make: Callable[[], GPT], begin: float | None = None) -> None:
        """The loss of what ``make`` gives, unless that has been measured."""
        if name in self.found:
            return
        begin = time.monotonic() if begin is None else begin
        model = make()
        seconds = time.monotonic() - begin
        perplexity = compressing._measure(model.eval(), self.settings, self.data).perplexity
        assert perplexity is not None
        parameters = sum(p.numel() for p in model.parameters())
        self.found[name] = {"loss": math.log(perplexity), "seconds": seconds, "parameters": parameters}
        self.file.write_text(json.dumps({"of": self.of, "found": self.found}, indent=1))
        print(f"{name:<28} perplexity {perplexity:.4f}  ({seconds:.0f} s)", flush=True)

    def made(self, method: str, target: str, heal: bool) -> GPT:
        """The dense model pruned by a method, or one that was trained with the masks growing."""
        if method in ("gradual", "sr-ste"):
            folder = trained(self.args, f"{method}-{target.replace(':', 'of')}", TARGETS[target], method)
            model, _ = job.load(folder, "cpu")
            compress.attach(model, export.read_model(folder).masks)
        else:
            model = copy.deepcopy(self.model)
            if method == "smaller":
                Shrink(parts(target) or {}).apply(model, self.text(model))
            elif method != "dense":
                Prune(TARGETS[target], method).apply(model, self.text(model))
        if heal:
            Heal(self.args.heal).apply(model, self.text(model))
        return model

    def part(self, part: str) -> None:
        for name in figures(part):
            method, target, *healed = name.split()
            self.measure(name, functools.partial(self.made, method, target, bool(healed)))


def figures(part: str) -> list[str]:
    """What a part measures, as "METHOD TARGET" or "METHOD TARGET healed"."""
    if part in ("gradual", "smaller"):
        targets = TARGETS if part == "gradual" else SMALLER
        made = [f"{part} {target}{healed}" for target in targets for healed in ("", " healed")]
        return [*made, *(f"sr-ste {SR_STE}{healed}" for healed in ("", " healed") if part == "gradual")]
    healed = " healed" * (part == "healed")
    dense = ["dense 0% healed"] if healed else []
    return dense + [f"{m} {t}{healed}" for t in TARGETS for m in METHODS if part != "model"]


def change(found: Found, name: str) -> float:
    """The perplexity's change against the dense model's."""
    return math.exp(found[name]["loss"] - found["dense"]["loss"]) - 1


def write(evidence: Quality, found: Found, args: argparse.Namespace, steps: int) -> None:
    perplexity = {name: math.exp(one["loss"]) for name, one in found.items()}
    of = lambda name: f"{perplexity[name]:.3f} ({perplexity[name] / perplexity['dense'] - 1:+.1%})"
    for target, prune in TARGETS.items():
        name = f"sparsegpt {target}"
        others = ", ".join(f"{m} {of(f'{m} {target}')}" for m in ("magnitude", "wanda"))
        evidence.row(
            "pruning", f"perplexity of the default job's model after {steps} steps, {target} of the blocks' weights zero",
            f"{perplexity['dense']:.3f}", of(name), found[name]["seconds"], seeds=(args.seed,),
            command=f"fastlm compress RUN --prune {prune}",
            note=f"By SparseGPT; {others}; masked while training {of(f'gradual {target}')}. Zeros make no dense kernel faster.",
        )  # fmt: skip
    for target in SMALLER:
        name = f"smaller {target}"
        evidence.row(
            "shrinking", f"perplexity of the default job's model without {target}, after {args.heal} steps of healing",
            f"{perplexity['dense']:.3f}", of(f"{name} healed"), found[f"{name} healed"]["seconds"],
            seeds=(args.seed,), command=f"fastlm compress RUN --prune {target} --heal {args.heal}",
            note=f"Without healing {of(name)}. "
            f"{found[name]['parameters'] / found['dense']['parameters']:.3f} of the parameters.",
        )  # fmt: skip
    name, at_once = f"sr-ste {SR_STE}", f"gradual {SR_STE}"
    evidence.row(
        "pruning", f"perplexity at {SR_STE} while training, {steps} steps: masked at once, and chosen in each step (SR-STE)",
        of(at_once), of(name), found[name]["seconds"], seeds=(args.seed,),
        command=f"fastlm train --prune {SR_STE} --prune-method sr-ste",
        note=f"After {args.heal} steps of healing {of(f'{at_once} healed')} and {of(f'{name} healed')}.",
    )  # fmt: skip
    best = min((*METHODS, "gradual"), key=lambda m: perplexity[f"{m} 70% healed"])
    name = "sparsegpt 70% healed"
    evidence.row(
        "pruning", f"perplexity at 70% by SparseGPT, without healing and after {args.heal} steps of it",
        of("sparsegpt 70%"), of(name), found[name]["seconds"], seeds=(args.seed,),
        command=f"fastlm compress RUN --prune 0.7 --heal {args.heal}",
        note=f"Dense: {perplexity['dense']:.3f}, after as many further steps {perplexity['dense 0% healed']:.3f}. The best "
        f"with healing: {best}, {of(f'{best} 70% healed')}.",
    )  # fmt: skip
    kinds = [f"{target}{healed}" for target in TARGETS for healed in ("", " healed")]
    evidence.table(
        "Change of the perplexity against the dense model, on the same tokens",
        ["method", *kinds],
        [
            [m, *(f"{change(found, f'{m} {k}'):+.2%}" if f"{m} {k}" in found else "-" for k in kinds)]
            for m in (*METHODS, "gradual", "sr-ste")
        ],
        f"{args.tokens:,} validation tokens; dense {perplexity['dense']:.4f}. Layer by layer; the tied embedding and head stay "
        f"whole. healed: {args.heal} steps more at a third of the learning rate, which change the dense model by "
        f"{change(found, 'dense 0% healed'):+.2%}. gradual: trained anew for {steps} steps with growing zeros (2:4: at once). "
        "sr-ste: as many steps, the weights of 2:4 chosen anew in each between 20% and 70% of them.",
    )
    evidence.table(
        "Increase of the loss, as a part of another's",
        ["of", "at most", "measured", "held"],
        [
            [name, f"{limit:.2f}", f"{value:.2f}", "yes" if value <= limit else "no"]
            for name, limit, value in bars(found)
        ],
    )


def bars(found: Found) -> list[tuple[str, float, float]]:
    """(what, its limit, what was measured): ratios of the loss's increase over the dense model's."""
    more = lambda name: found[name]["loss"] - found["dense"]["loss"]
    out = [
        (f"SparseGPT against magnitude, {target}", limit, more(f"sparsegpt {target}") / more(f"magnitude {target}"))
        for target, limit in BARS.items()
    ]
    out.append(("gradual with healing against SparseGPT, 70%", 1.0, more("gradual 70% healed") / more("sparsegpt 70%")))
    out.append((f"SR-STE against masked at once, {SR_STE}", 1.0, more(f"sr-ste {SR_STE}") / more(f"gradual {SR_STE}")))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1800, help="of each training (the default job takes 2930)")
    parser.add_argument("--heal", type=int, default=200, help="steps of healing")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32_768, help="of validation")
    parser.add_argument("--run", default="", help="a trained run in place of a new one")
    parser.add_argument("--keep", type=Path, default=Path("runs/quality-prune"), help="folder of models and losses")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="these parts; all by default")
    parser.add_argument("--dry", action="store_true", help="print the rows and write no result")
    parser.add_argument("--provisional", default="", help="why times are not to be trusted")
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    evidence = Quality(__file__, of=OF, provisional=args.provisional)
    measure = Measure(args, evidence.data["sources"])
    for part in args.only:
        begin = time.monotonic()
        measure.part(part)
        print(f"{part}: {time.monotonic() - begin:.0f} s", flush=True)
    found = measure.found
    wanted = [name for part in PARTS for name in figures(part)]
    if missing := [name for name in wanted if name not in found]:
        print(f"no result yet: {len(missing)} of {len(wanted)} figures are to come, such as {missing[0]}")
        return
    evidence.begin = time.monotonic() - sum(one["seconds"] for one in found.values())  # of all parts
    write(evidence, found, args, measure.settings.optim.steps)
    if args.dry:
        print(json.dumps({k: evidence.data[k] for k in ("rows", "tables")}, indent=1, ensure_ascii=False))
    else:
        evidence.save()
    for name, limit, value in bars(found):
        print(f"{name:<45} {value:.2f} (at most {limit:.2f}){'' if value <= limit else ': MISSED'}")


if __name__ == "__main__":
    main()
