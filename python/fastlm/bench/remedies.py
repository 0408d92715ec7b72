"""docs/remedies.md: one row for each remedy of training's six challenges, from ``bench/results/*.json``.

python -m fastlm.bench.remedies               writes the page
python -m fastlm.bench.remedies --run NAME    runs bench/quality_NAME.py first (without a name: each of them)
python -m fastlm.bench.remedies --status      which results' sources have changed since they were measured

A row has figures, or a sentence that says what stands today; a test fails where it has neither. No number is typed here.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlm.bench import quality_results, results, sources

PAGE = "docs/remedies.md"
PLANNED = "Not built yet (planned)."
COMMITTED = "cpu-avx512-2cores"  # the result file of `fastlm bench` that rows of what stood before are taken from
Line = dict[str, Any]  # measured, before, after, seconds, seeds, command, note, source


@dataclass(frozen=True)
class Remedy:
    """A row: its key in quality results, the challenge, its name, the user's command, and what stands without a figure."""

    key: str
    challenge: str
    name: str
    command: str
    standing: str
    committed: Callable[[dict[str, Any]], Line] | None = None


def _to_quality(model: str) -> Callable[[dict[str, Any]], Line]:
    def line(data: dict[str, Any]) -> Line:
        rows = [r for r in data["time_to_quality"] if r["model"] == model]
        ours = [r for r in rows if r["loop"] == "fastlm"]
        lr = {
            s: min((r for r in rows if r["loop"] == "plain" and r["seed"] == s), key=lambda r: r["loss"])
            for s in (1, 2, 3)
        }
        plain = statistics.median(r["seconds"] for r in lr.values())
        mine = statistics.median(r["seconds"] for r in ours)
        return {
            "measured": f"seconds of training to the loss of a plain PyTorch loop, {model} parameters",
            "before": f"{plain:.0f} s", "after": f"{mine:.0f} s", "seconds": sum(r["seconds"] for r in rows),
            "seeds": [r["seed"] for r in ours], "command": "", "source": ours[0]["source"],
            "note": "Architecture, optimiser and kernels together. By `fastlm bench train --long`.",
        }  # fmt: skip

    return line


def _case(op: str, name: str, before: str, after: str, what: str) -> Callable[[dict[str, Any]], Line]:
    def line(data: dict[str, Any]) -> Line:
        case = next(c for c in data["cases"] if c["op"] == op and c["name"] == name)
        times = {c["name"]: c for c in case["contenders"]}
        return {
            "measured": what, "before": f"{times[before]['median_s']:.2f} s", "after": f"{times[after]['median_s']:.2f} s",
            "seconds": sum(c["median_s"] * c["samples"] for c in case["contenders"] if c["status"] == "ok"), "seeds": [],
            "command": "", "source": _first(data["runs"][op]["sources"]), "note": f"By `fastlm bench {op}`.",
        }  # fmt: skip

    return line


def _loading(data: dict[str, Any]) -> Line:
    profile = data["profiles"]["loading"]
    one, two = (profile[f"prepare 64 MB, bpe, {n} process(es)"]["MB/s"] for n in (1, 2))
    return {
        "measured": "MB/s of text made into BPE tokens, one process and two", "before": f"{one:.1f}", "after": f"{two:.1f}",
        "seconds": 64 / one + 64 / two, "seeds": [], "command": "",
        "source": _first(data["runs"]["loading"]["sources"]),
        "note": "A second run finds the corpus prepared. By `fastlm bench loading`.",
    }  # fmt: skip


def _first(hashes: dict[str, str] | str) -> str:
    return hashes if isinstance(hashes, str) else next(iter(hashes.values()))


COMPUTE, DATA, TOXIC = "Compute", "Too little data", "Toxic output"
TIME, FIT, ENERGY, INSIDE = "Time", "Overfitting", "Energy", "Interpretability"
STEP = "6x384 context 256 batch 16 dropout 0.2"

ROWS = (
    Remedy("cloud", COMPUTE, "Cloud machines", "fastlm launch skypilot", PLANNED + " Checkpoints that resume bit for bit, "
           "and ranks that end together when one is lost, are what a spot machine needs; both are tested."),
    Remedy("shared", COMPUTE, "Shared hardware and grants", "fastlm launch slurm; fastlm plan --request FILE",
           PLANNED + " `fastlm train` runs under slurm's srun, and SIGTERM saves the step."),
    Remedy("pruning", COMPUTE, "Compression: pruning", "fastlm compress RUN --prune 0.5; fastlm train --prune 0.7",
           "Built: magnitude, Wanda, SparseGPT, the cubic schedule and SR-STE; tests hold the zeros through every optimiser. "
           "What it costs in perplexity is not measured yet."),
    Remedy("int8", COMPUTE, "Compression: 8-bit", "fastlm compress RUN --int8",
           "Built; tests hold its sums exact and its errors under bounds. What it costs in perplexity is not measured yet."),
    Remedy("distillation", COMPUTE, "Compression: distillation", "fastlm train CORPUS --teacher RUN", PLANNED),
    Remedy("shrinking", COMPUTE, "Compression: fewer layers and heads", "fastlm compress RUN --prune layers:1 --heal N",
           "Built: heads, MLP channels and layers go whole, by measured importance; tests hold the exported model's logits to "
           "transformers'. What it costs in perplexity is not measured yet."),
    Remedy("architecture", COMPUTE, "A simpler architecture", "fastlm train --style llama --optimizer muon",
           PLANNED, _to_quality("0.8M")),
    Remedy("existing", DATA, "Existing data, cleaned", "fastlm data clean IN --out FOLDER", PLANNED + " `fastlm train` reads "
           "text, .jsonl, .parquet and saved `datasets` folders, and mixes them by `--weights`."),
    Remedy("backtranslation", DATA, "Back-translation", "fastlm data augment IN --backtranslate apertium:eng-cat --out FILE",
           "Built; tests hold groups, filters and restarts. Its gain is not measured yet."),
    Remedy("replacement", DATA, "Word replacement", "fastlm data augment IN --replace 0.1 --thesaurus auto --out FILE",
           "Built; tests hold groups, filters and restarts. Its gain is not measured yet."),
    Remedy("shuffling", DATA, "Sentence shuffling", "fastlm data augment IN --shuffle 3 --out FILE",
           "Built; tests hold groups, filters and restarts. Its gain is not measured yet."),
    Remedy("crowds", DATA, "Crowds", "fastlm data tasks IN --out tasks.json; fastlm data labels EXPORT --out FILE",
           "Built; a test holds the round trip and that spammers do not decide. "
           "Its gain on real crowd labels is not measured yet."),
    Remedy("card", DATA, "Representative data", "fastlm data card CORPUS --model RUN",
           "Built; tests hold its counts to corpora of known content, and its interval to how often it covers the truth."),
    Remedy("filtering", TOXIC, "Filtering", "fastlm data filter LABELLED --out FOLDER",
           "Built; tests hold folding, policy and its uses. Its figures are not measured yet."),
    Remedy("adversarial", TOXIC, "Adversarial training", "fastlm data filter LABELLED --attack --out FOLDER",
           "Built; the command prints recall on each family of attacks, trained on and held out. Not measured here yet."),
    Remedy("curated", TOXIC, "Curated fine-tuning", "fastlm train chats.jsonl --init RUN --sft", "Built: chats and "
           "prompts with answers; tests hold which tokens are trained, and the losses to TRL's. Its gain is not measured yet."),
    Remedy("review", TOXIC, "Human review", "fastlm review RUN", "Built; in a test two people judge 100 items in a browser "
           "while the server is killed, and nothing is lost or double."),
    Remedy("feedback", TOXIC, "Feedback", "fastlm data pairs; fastlm train pairs.jsonl --init RUN --dpo",
           "Built: better answers and thumbs become pairs. What a round of it changes is not measured yet."),
    Remedy("standards", TOXIC, "Community standards", "FOLDER/policy.toml of fastlm data filter",
           "Built: categories, thresholds and actions in a file; `data clean` and `data card` name its hash."),
    Remedy("distribution", TIME, "Distributed training", "fastlm train --mesh dp=N,fsdp=M",
           "Built; tests hold losses, masks and checkpoints of every mesh to those of one process. Its speed on several "
           "machines was never measured. docs/parallel.md says which meshes are tested."),
    Remedy("accelerators", TIME, "Accelerators and their kernels", "fastlm.swap(model)", PLANNED,
           _case("step", STEP + " bfloat16", "torch", "fused", "seconds of a training step on a CPU, PyTorch's kernels and "
                 "fastlm's, 10.75M parameters, bfloat16")),
    Remedy("model-parallelism", TIME, "Model parallelism", "fastlm train --mesh tp=N,pp=M",
           "Built: tensor and sequence parallel, pipelines, interleaved stages; tests hold them to one process. Never run on "
           "GPUs; its speed was never measured."),
    Remedy("early-stopping", TIME, "Early stopping and checkpoints", "fastlm train --patience 5",
           "Built: training stops after so many evaluations without improvement and restores the best weights; a test shows "
           "both. A killed run resumes bit for bit, which a test shows at random instants."),
    Remedy("loading", TIME, "Efficient loading", "fastlm data prepare", PLANNED, _loading),
    Remedy("size", TIME, "The right size of model", "fastlm plan --budget", PLANNED + " `fastlm plan` states memory, flops "
           "and traffic of a shape before it is trained."),
    Remedy("more-data", FIT, "More data", "fastlm train CORPUS --fractions 0.125 0.25 0.5",
           "Built: a power law of loss and text, and its error at a point held back. Not measured yet."),
    Remedy("augmented", FIT, "Augmentation", "fastlm train IN aug.jsonl --weights 1 0.3",
           "Built: `fastlm data augment` writes the copies. Its gain is not measured yet."),
    Remedy("regularisation", FIT, "Regularisation", "fastlm train --dropout 0.2 --weight-decay 0.1",
           "Built: dropout, weight decay, label smoothing, z-loss, clipping, an average of weights (`--ema`). Its gain on "
           "little data is not measured yet."),
    Remedy("lora", FIT, "Few trained weights (LoRA)", "fastlm train TEXT --init RUN --lora-rank 8",
           "Built; a test holds that nothing but the factors changes. Its gain is not measured yet."),
    Remedy("ensembles", FIT, "Ensembles and averages", "fastlm eval A B C --ensemble; fastlm soup A B C --out S",
           "Built; tests hold the mean of probabilities to float64, and soups to runs of one ancestor. Not measured yet."),
    Remedy("cross-validation", FIT, "Cross-validation", "fastlm train CORPUS --folds 5",
           "Built: folds by group, resumed as a whole; tests hold both. Not measured yet."),
    Remedy("hardware", ENERGY, "Efficient hardware", "fastlm bench step",
           "Built: J/token by dtype and batch, where a counter measures. No counter was at hand, so there is no figure."),
    Remedy("efficient-model", ENERGY, "An efficient model", "fastlm compress RUN",
           "Built: int8, pruning, fewer heads, channels and layers. Energy is not measured yet."),
    Remedy("allocation", ENERGY, "Allocation", "fastlm plan --devices N", "Built: of all meshes of so many devices `fastlm "
           "plan` names the one that computes and idles least. Energy is not measured yet."),
    Remedy("scheduling", ENERGY, "Scheduling", "fastlm train --when curve.csv --deadline 24h",
           "Built: plans equal brute force, and a paused run ends bit for bit as one that never paused; tests hold both."),
    Remedy("data-centre", ENERGY, "Data centre", "fastlm train --carbon 381 --pue 1.2",
           "Built: kWh with the data centre's share, kg CO2e and the idle share in the report; a test holds their sums."),
    Remedy("inspect", INSIDE, "A look inside", 'fastlm inspect RUN --prompt "..."', "Built: loss, attention, logit lens and "
           "saliency; tests hold them to the model and to transformers. What they tell is not measured yet."),
)  # fmt: skip

HEAD = """# The remedies, one by one

What makes training a language model hard, what helps, and what was measured of it. `make evidence` makes this page from
`bench/results/`; no number here is typed by hand. A row without a figure says what stands today.

*Before* is without the remedy, *after* with it. *Seconds* is what measuring took. *Sources* is a hash of the code that gave
the figures; `python -m fastlm.bench.remedies --status` says where that code has changed since.
"""


def known() -> set[str]:
    return {row.key for row in ROWS}


def lines(root: Path) -> Iterator[tuple[Remedy, list[Line]]]:
    """Each remedy with its measured lines: those of quality scripts, else those of the committed benchmarks, else none."""
    found: dict[str, list[Line]] = {}
    for name, data in quality_results.load(root).items():
        for row in data["rows"]:
            if row["remedy"] not in known():
                raise ValueError(f"{name}.json has a row of {row['remedy']!r}, which is no remedy of bench/remedies.py")
            found.setdefault(row["remedy"], []).append(row | {"source": data["sources"], "file": name})
    file = root / "bench/results" / f"{COMMITTED}.json"
    committed = results.load(file) if file.is_file() else None
    for remedy in ROWS:
        own = found.get(remedy.key, [])
        if not own and remedy.committed and committed is not None:
            own = [remedy.committed(committed) | {"file": COMMITTED}]
        yield remedy, own


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _row(remedy: Remedy, line: Line | None, first: bool) -> str:
    name, command = (remedy.name, f"`{remedy.command}`") if first else ('"', '"')
    if line is None:
        return f"| {_cell(name)} | {_cell(command)} | {_cell(remedy.standing)} | - | - | - | - | - |"
    command = f"`{line['command']}`" if line["command"] else command
    what = f"{line['measured']}. {line['note']}" if line["note"] else line["measured"]
    seeds = ", ".join(map(str, line["seeds"])) or "-"
    cells = [name, command, what, line["before"], line["after"], f"{line['seconds']:,.0f}" if line["seconds"] >= 10 else
             f"{line['seconds']:.1f}", seeds, f"`{line['source'][:8]}`"]  # fmt: skip
    return "| " + " | ".join(map(_cell, cells)) + " |"


HEADER = ("remedy", "command", "measured", "before", "after", "seconds", "seeds", "sources")


def page(root: Path) -> str:
    """The page as text."""
    out, challenge = [HEAD], ""
    for remedy, own in lines(root):
        if remedy.challenge != challenge:
            challenge = remedy.challenge
            out.append(
                f"\n## {challenge}\n\n| {' | '.join(HEADER)} |\n| --- | --- | --- | ---: | ---: | ---: | --- | --- |"
            )
        rows: list[Line | None] = [*own] or [None]
        out += [_row(remedy, line, i == 0) for i, line in enumerate(rows)]
    every = quality_results.load(root)
    out.append("\n# How the figures were made")
    file = root / "bench/results" / f"{COMMITTED}.json"
    if file.is_file():
        data = results.load(file)
        m = data["machine"]
        where = f"{m['device']}, {m['threads']} threads, {m['instruction_set']}, torch {m['versions']['torch']}"
        out.append(f"\nRows by `fastlm bench`: bench/results/{file.name}, {data['date'][:10]}, {where}.")
    for name, data in every.items():
        out.append("\n" + "\n".join(_details(name, data)).rstrip())
    return "\n".join(out).rstrip() + "\n"


def _details(name: str, data: dict[str, Any]) -> Iterator[str]:
    m = data["machine"]
    yield f"## {name.removeprefix('quality-')}\n"
    busy = f" Times are provisional: {data['provisional']}." if data.get("provisional") else ""
    where = f"{m['device']}, {m['cores']} cores, {m['instruction_set'] or 'no compiled core'}"
    yield f"`{data['command']}`, {data['seconds']:.0f} s, {data['date'][:10]}, {where}, torch {m['versions']['torch']}.{busy}\n"
    for table in data.get("tables", []):
        yield f"**{table['title']}**\n"
        yield f"| {' | '.join(map(_cell, table['header']))} |"
        yield "| " + " | ".join(["---"] + ["---:"] * (len(table["header"]) - 1)) + " |"
        yield from (f"| {' | '.join(map(_cell, row))} |" for row in table["rows"])
        yield f"\n{table['note']}\n" if table["note"] else ""
    for group in data.get("examples", []):
        yield f"**{group['title']}**\n"
        for before, after in group["pairs"]:
            yield f"- {_cell(before)}\n  → {_cell(after)}"
        yield ""


def write(root: Path) -> Path:
    """Writes the page; returns its path."""
    results.write(root / PAGE, page(root))
    return root / PAGE


def status(root: Path) -> Iterator[tuple[str, str]]:
    """(result, whether its sources have changed since)."""
    for name, data in quality_results.load(root).items():
        old = quality_results.changed(data, root)
        yield (
            name,
            f"the sources have changed since {data['date'][:10]}; {data['command']}" if old else "of these sources",
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m fastlm.bench.remedies", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--run", nargs="*", metavar="NAME", help="run these of bench/quality_*.py first")
    parser.add_argument("--status", action="store_true", help="exit 1 if a result is of other sources")
    args = parser.parse_args(argv)
    root = sources.checkout()
    if args.status:
        states = list(status(root))
        for name, state in states:
            print(f"{name:<20} {state}")
        return int(any(state != "of these sources" for _, state in states))
    if args.run is not None:
        known = {p.stem.removeprefix("quality_"): p for p in sorted((root / "bench").glob("quality_*.py"))}
        for name in args.run or known:
            if name not in known:
                parser.error(f"--run: there is no bench/quality_{name}.py; there are {', '.join(known) or 'none'}")
            print(f"--- {name}", flush=True)
            if code := subprocess.call([sys.executable, str(known[name])], cwd=root):
                return code
    print(f"wrote {write(root).relative_to(root)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
