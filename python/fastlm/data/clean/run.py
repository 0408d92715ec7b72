"""Runs the blocks of `fastlm data clean` on datatrove's executors, in tasks that depend on the corpus alone.

Three stages: `clean` reads, mends and judges each document; `link` joins copies over all tasks; `write` gives out what
stays. A finished task leaves a mark in OUT/.clean, so a run that was killed goes on with what is missing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastlm.data import corpus as corpora
from fastlm.data import filter as filters
from fastlm.data.card import policies
from fastlm.data.clean.options import CleanOptions, bands
from fastlm.data.cutting import WHOLE, Part, parts
from fastlm.data.errors import FULL, InputError

TASK = 8 << 20  # bytes on disk of a task: small enough that workers end at nearly the same time
TASK_FILES = 256
STAGES = ("clean", "link", "write")
FORMAT = 2
_Unit = tuple[str, int, int, int, bool, bool]  # path, start, end, size, rows, read in order


def needed(command: str = "clean") -> None:
    """Raises InputError that names the packages of the extra `data` that are missing."""
    import importlib.util

    names = {"datatrove": "datatrove", "ftfy": "ftfy", "py3langid": "py3langid", "trafilatura": "trafilatura",
             "lxml_html_clean": "lxml_html_clean", "phonenumbers": "phonenumbers", "stdnum": "python-stdnum"}  # fmt: skip
    if missing := [pip for name, pip in names.items() if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"fastlm data {command} needs {', '.join(missing)}: pip install -c constraints.txt 'fastlm[data]'"
        )


def tasks(files: list[Path], options: CleanOptions) -> list[list[_Unit]]:
    """Parts of files by task. They depend on the files and on how they are read."""
    found: list[list[_Unit]] = [[]]
    size = 0
    for path in files:
        with corpora.readers.Named(path):
            length = path.stat().st_size
            form = corpora.form(path, options.field)
            units: list[_Unit] = []
            if corpora.apart(path, form, options.separator):
                rows = form == "lines"
                ranged = length > (corpora.cutting.JOB if rows else WHOLE)
                cut = parts(path, length, rows) if ranged else [Part(path, 0, length, length, rows)] if length else []
                units = [(str(path), p.start, p.end, p.size, p.rows, False) for p in cut]
            elif length:
                units = [(str(path), 0, length, length, False, True)]
        for unit in units:
            if found[-1] and (size + unit[2] - unit[1] > TASK or len(found[-1]) >= TASK_FILES):
                found.append([])
                size = 0
            found[-1].append(unit)
            size += unit[2] - unit[1]
    return [task for task in found if task]


class Plan:
    """OUT/.clean: what is to be done, of what, and how far it has come."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / ".clean"
        self.path, self.rows = self.folder / "plan.json", self.folder / "rows"
        self.tally, self.dropped = self.folder / "tally", self.folder / "dropped"

    def load(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.path.read_text()))
        except (OSError, ValueError) as error:
            raise InputError(f"{self.out} holds no cleaned corpus: {self.path} cannot be read ({error})") from error

    def begin(self, names: tuple[str, ...], options: CleanOptions) -> int:
        """Writes the plan, or finds it; the number of tasks. Raises InputError where OUT holds something else."""
        files = corpora.expand(names)
        inside = [f for f in files if self.out.resolve() in f.resolve().parents]
        if inside:
            raise InputError(f"--out {self.out} holds {inside[0]}, which is to be cleaned: give another folder")
        stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        said = options.plan() | ({"filter": filters.load(options.filter).hash} if options.filter else {})
        own = hashlib.sha256(repr((FORMAT, stats, sorted(said.items()))).encode()).hexdigest()[:16]
        if self.path.exists():
            if self.load()["key"] != own:
                raise InputError(
                    f"--out {self.out} holds the result of other files or options: give another folder, or delete it"
                )
            return len(self.load()["tasks"])
        corpora.refuse_inside(self.out / "00000.jsonl", names)
        if self.out.exists() and any(path != self.folder for path in self.out.iterdir()):
            raise InputError(
                f"--out {self.out} is not empty and was not made by fastlm data clean: give another folder"
            )
        found = tasks(files, options)
        if not found:
            raise InputError(f"the corpus is empty: {len(files)} file(s) without text")
        if self.folder.exists():  # without a plan: what lies there is of a call that was broken off before it began
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        draft = self.path.with_suffix(".draft")
        policy = policies.told(filters.load(options.filter)) if options.filter else {}
        draft.write_text(json.dumps({"key": own, "options": said, "in": list(names), "tasks": found, "policy": policy}))
        os.replace(draft, self.path)
        return len(found)

    def done(self, stage: str, count: int) -> bool:
        return all((self.folder / "logs" / stage / "completions" / f"{rank:05d}").exists() for rank in range(count))

    def finished(self) -> bool:
        return (self.folder / "table.json").exists()

    def counts(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for path in sorted(self.tally.glob("*.json")):
            total.update(json.loads(path.read_text()))
        return total

    def finish(self, count: int) -> dict[str, Any]:
        """The table, once all tasks are done."""
        found = self.counts()
        rules = {k.split(":", 1)[1]: {"documents": v, "bytes": found[f"bytes:{k.split(':', 1)[1]}"]}
                 for k, v in sorted(found.items()) if k.startswith("documents:")}  # fmt: skip
        table = {
            "documents": found["read"], "bytes": found["read_bytes"], "kept": found["kept"],
            "kept_bytes": found["kept_bytes"], "dropped": rules,
            "found": {k: v for k, v in sorted(found.items()) if k.startswith(("masked:", "found:"))},
            "passages": {k.partition(":")[2]: v for k, v in sorted(found.items()) if k.startswith("passages:")},
            "filter": self.load()["options"]["filter"], "policy": self.load().get("policy", {}),
        }  # fmt: skip
        draft = self.folder / "table.draft"
        draft.write_text(json.dumps(table, indent=1))
        os.replace(draft, self.folder / "table.json")
        return table


def pipeline(plan: Plan, options: CleanOptions) -> dict[str, list[Any]]:
    """The blocks of each stage, as datatrove runs them anywhere."""
    from fastlm.data.clean import near, read, rules

    where = (plan.tally, plan.dropped)
    count, rows = bands(options.dedup) if options.dedup else (0, 0)
    blocks: list[Any] = [read.Read(plan.path, options.field, options.separator, plan.tally)]
    blocks += [rules.Html(*where)] if options.html else []
    blocks += [rules.Repair(*where)] if options.repair else []
    blocks += [rules.Language(*where, options.lang)] if options.lang else []
    blocks += [rules.Quality(*where, options.min_words)] if options.quality == "gopher" else []
    blocks += [rules.Repetition(*where)] if options.repetition == "gopher" else []
    if options.c4 != "off":
        blocks += [rules.C4(*where) if options.c4 == "paper" else rules.Cookies(*where)]
    blocks += [rules.Personal(*where, options.pii, options.pii_kinds)] if options.pii != "off" else []
    if options.filter:
        from fastlm.data.clean import scorer

        blocks += [scorer.Harmful(*where, Path(options.filter).expanduser())]
    return {
        "clean": [*blocks, near.Keep(plan.rows, count, rows)],
        "link": [near.Link(plan.rows, count, options.exact, options.dedup)],
        "write": [
            near.Rows(plan.rows, count),
            near.Copies(*where, options.copies == "group"),
            near.Write(plan.out, plan.tally),
        ],
    }


def _executors(plan: Plan, options: CleanOptions, count: int) -> list[Any]:
    os.environ.setdefault("DATATROVE_COLORIZE_LOGS", "0")
    blocks = pipeline(plan, options)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = options.workers or cores
    made: list[Any] = []
    for stage in STAGES:
        common: dict[str, Any] = {
            "pipeline": blocks[stage],
            "tasks": 1 if stage == "link" else count,
            "workers": min(workers, 1 if stage == "link" else count),
            "logging_dir": str(plan.folder / "logs" / stage),
        }
        if options.executor == "slurm":
            from datatrove.executor.slurm import SlurmPipelineExecutor

            made.append(SlurmPipelineExecutor(**common, time=options.slurm_time, partition=options.slurm_partition,
                        job_name=f"fastlm-{stage}", depends=made[-1] if made else None))  # fmt: skip
        elif options.executor == "ray":
            from datatrove.executor.ray import RayPipelineExecutor

            made.append(RayPipelineExecutor(**common))
        else:
            from fastlm.data.clean.executor import Quiet, preload

            preload(list(common["pipeline"]))
            made.append(Quiet(**common))
    return made


# Shown while it works. A stdout that takes no more says so here, and not where a stage starts processes, whose error would
# be taken for that of the folder's disk.
_print = functools.partial(print, flush=True)


def clean(names: tuple[str, ...], out: Path, options: CleanOptions, note: Any = _print) -> dict[str, Any] | None:
    """Cleans a corpus into a folder; its table, or None where the tasks were handed to slurm and are not done.

    Raises InputError where the input, an option or the folder cannot be used, and where nothing is left.
    """
    options.check()
    needed()
    if options.executor == "ray":
        import importlib.util

        if importlib.util.find_spec("ray") is None:
            raise InputError("--executor ray needs the package ray: pip install -c constraints.txt ray")
    if options.executor == "slurm" and shutil.which("sbatch") is None:
        raise InputError("--executor slurm needs the program sbatch, which is not on this machine")
    plan = Plan(out)
    count = plan.begin(names, options)
    if not plan.finished():
        executors = _executors(plan, options, count)
        for stage, executor in zip(STAGES, executors):
            here = 1 if stage == "link" else count
            if plan.done(stage, here):
                continue
            if options.executor == "slurm":
                executors[-1].run()
                note(f"the tasks are with slurm; the same command shows the table when they are done ({plan.folder})")
                return None
            note(f"{stage}: {here} task(s)")
            try:
                executor.run()
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise InputError(
                    f"{out}: {error.strerror}; the tasks that are done are kept, make room and the same command goes on"
                ) from error
        plan.finish(count)
    shutil.rmtree(plan.rows, ignore_errors=True)  # what only the tasks needed; here too after a kill beside the table
    table: dict[str, Any] = json.loads((plan.folder / "table.json").read_text())
    if not table["kept"]:
        most = max(table["dropped"], key=lambda rule: table["dropped"][rule]["documents"], default="")
        raise InputError(
            f"nothing is left of {table['documents']} documents; most fell to {most or 'no rule'}: see "
            f"--show-dropped {most or 'RULE'}, and turn that step off"
        )
    return table


def lines(table: dict[str, Any]) -> Iterator[str]:
    """The table as text."""
    documents, size = max(table["documents"], 1), max(table["bytes"], 1)
    yield f"{'rule':<30} {'documents':>10} {'share':>7} {'bytes':>14} {'share':>7}"
    rows = sorted(table["dropped"].items(), key=lambda item: -item[1]["documents"])
    for rule, n in rows:
        yield (
            f"{rule:<30} {n['documents']:>10,} {n['documents'] / documents:>7.1%} {n['bytes']:>14,} {n['bytes'] / size:>7.1%}"
        )
    kept, left = table["kept"], table["kept_bytes"]
    yield f"{'kept':<30} {kept:>10,} {kept / documents:>7.1%} {left:>14,} {left / size:>7.1%}"
    yield f"{'read':<30} {table['documents']:>10,} {'':>7} {table['bytes']:>14,}"
    if table["found"]:
        yield "personal data: " + ", ".join(f"{k.replace(':', ' ')} {v:,}" for k, v in table["found"].items())
    if table.get("passages"):
        yield "passages masked: " + ", ".join(f"{k} {v:,}" for k, v in table["passages"].items())
    if table.get("filter"):
        yield f"filter: policy {table['filter']}"


def show_dropped(out: Path, rule: str, count: int = 10) -> Iterator[str]:
    """The first `count` documents that a rule took, each with its source, reason and beginning."""
    plan = Plan(out)
    plan.load()
    rules = sorted(p.name for p in plan.dropped.iterdir()) if plan.dropped.is_dir() else []
    if rule not in rules:
        raise InputError(f"no document of {out} was dropped by {rule!r}; rules that dropped some: {', '.join(rules)}")
    shown = 0
    for path in sorted((plan.dropped / rule).glob("*.jsonl")):
        with open(path) as file:
            for line in file:
                row = json.loads(line)
                text = " ".join(row["text"][:400].split())
                yield f"{row['source']}: {row['why']}\n    {text[:240]}"
                shown += 1
                if shown == count:
                    return
