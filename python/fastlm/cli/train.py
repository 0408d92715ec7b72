"""`fastlm train [CORPUS ...]`: flags from the configuration's dataclasses, then a new run, a resumed or a forked one; or,
with --folds and --fractions, a series of runs, each by this command."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from fastlm import console
from fastlm.cli import flags
from fastlm.cli.data import reading
from fastlm.train import job, launch, mesh, series, waiting
from fastlm.train.config import Config, DataConfig, ModelConfig, OptimConfig, RunConfig
from fastlm.train.folders import check_trains, find_init, find_origin


def _value(argv: list[str], flag: str) -> str:
    """The value of a flag that decides what the others' defaults are."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
    return ""


EXAMPLES = """
fastlm train                                 # Python's own library
fastlm train book.txt --size small --dropout 0.1
fastlm train rows.jsonl --field content --tokenizer bpe
fastlm train a.txt b/ --weights 3 1 --name mixed
fastlm train --resume mixed --steps 6000     # go on, for longer
fastlm train --fork mixed --lr 3e-4          # a new run from its weights
fastlm train notes/ --init hf-model/ --lora-rank 8
fastlm train book.txt --mesh fsdp=2 --dtype bfloat16
fastlm train book.txt --when carbon.csv --deadline 24h
fastlm train rows.jsonl --folds 5            # cross-validation
fastlm train book.txt --fractions 0.125 0.25 0.5    # a learning curve
"""


def parse(argv: list[str]) -> tuple[Config, tuple[str, ...], dict[str, Any]]:
    """Configuration, corpus and {resume, fork, other_data, origin, folds, fractions}. With --resume or --fork the defaults are
    that run's."""
    origin = _value(argv, "--resume") or _value(argv, "--fork")
    folder = find_origin(origin, _value(argv, "--out")) if origin else None
    base, known_corpus = job.read_config(folder) if folder else (Config(), ())
    if folder:
        check_trains(folder)
    if _value(argv, "--fork"):
        base.run.name = ""

    def train(
        corpus: flags.Corpus = (),
        model: ModelConfig = base.model,
        data: DataConfig = base.data,
        optim: OptimConfig = base.optim,
        run: RunConfig = base.run,
        resume: str = "",
        fork: str = "",
        other_data: bool = False,
        folds: int | None = None,
        fractions: tuple[float, ...] = (),
    ) -> tuple[Config, tuple[str, ...], dict[str, Any]]:
        """Train a language model on text.

        Without a CORPUS it learns from the source of the running Python's own standard library. Ctrl-C saves and stops; a run
        goes on with --resume.

        Args:
            corpus: Files, folders and globs of text, source code, rows (.jsonl, .json, .csv, .parquet) and datasets saved to
                disk, plain or .gz, .zst, .xz, .bz2.
            resume: Run to go on with, from its last checkpoint; flags given beside it change it.
            fork: Run from whose last checkpoint a new run starts.
            other_data: Go on although the data differ from the checkpoint's.
            folds: Cross-validation: as many runs, each of which holds out another part of the documents.
            fractions: Learning curve: a run on each of these parts of the training text, and what more text would bring.
        """
        options = {"resume": resume, "fork": fork, "other_data": other_data, "origin": folder}
        options |= {"folds": folds, "fractions": fractions}
        return Config(model, data, optim, run), corpus or known_corpus, options

    init = _value(argv, "--init")
    if init and not origin and not _value(argv, "--tokenizer"):
        base.data.tokenizer = job.tokenizer_of(find_init(init, _value(argv, "--out") or base.run.out))
    return flags.call(train, "fastlm train", argv, EXAMPLES)


def main(argv: list[str]) -> int:
    if (place := series.find(_value(argv, "--resume"), _value(argv, "--out"))) is not None:
        return _series_goes_on(place, argv)
    config, corpus, options = parse(argv)
    if several := series.asked(options.get("folds"), options.get("fractions", ()), config):
        return _series(several, config, corpus, options)
    config.check()
    if options["resume"] and options["fork"]:
        raise job.InputError("--resume and --fork exclude each other")
    if options["other_data"] and not (options["resume"] or options["fork"]):
        raise job.InputError("--other-data is for a run that goes on: give --resume or --fork, or leave it out")
    count = launch.processes(config.run)
    if config.run.when and waiting.parent() is None:
        return _wait(config, options, argv, count)
    if count > 1:
        return launch.run([sys.executable, "-m", "fastlm", "train", *argv], count, config.run.threads)
    launch.die_with_launcher()
    ranks = mesh.start(config.run.mesh, config.run.device)
    try:
        with ranks.watch():  # from the first line of the corpus to the report: a lost rank ends the others in seconds
            return _train(config, corpus, options, ranks)
    except mesh.PeerError:
        return 2  # the rank that could not go on has said why
    finally:
        ranks.close()


def _series(several: tuple[str, tuple[str, ...]], config: Config, corpus: tuple[str, ...], options: Any) -> int:
    kind, parts = several
    name = f"--{kind}s"
    config.check()
    for other in ("resume", "fork"):
        if options[other]:
            raise job.InputError(
                f"{name} and --{other} exclude each other: {options[other]} has seen what a run would hold out"
            )
    if mesh.find(os.environ) is not None:
        raise job.InputError(
            f"{name} beside torchrun or slurm, which start the processes: each run starts them itself, by --nproc"
        )
    with reading() as note:
        made = series.begin(kind, parts, config, corpus, note)
    return series.run(made, main)


def _series_goes_on(folder: Path, argv: list[str]) -> int:
    known = {"--resume", "--out"}
    rest = [word for i, word in enumerate(argv) if word.split("=")[0] not in known and not (i and argv[i - 1] in known)]
    if rest:
        raise job.InputError(f"{folder} is a series of runs and goes on as it began: leave {' '.join(rest)} out")
    return series.run(series.read(folder), main)


def _wait(config: Config, options: dict[str, Any], argv: list[str], count: int) -> int:
    """This process waits, and starts those that train."""
    if mesh.find(os.environ) is not None:
        raise job.InputError(
            "--when beside torchrun or slurm, which start the processes: it starts them itself, by --nproc"
        )
    folder = options["origin"] if options["resume"] else None
    fresh = bool(_value(argv, "--deadline"))
    return waiting.Waiter(config.run, folder, fresh, config.optim.steps).run(argv, count, config.run.threads)


def check_place(folder: Path, was: Config, now: Config) -> None:
    """InputError where a run that goes on in its folder is asked for under another name, or elsewhere."""
    if now.run.name not in (was.run.name, folder.resolve().name):
        raise job.InputError(
            f"--name is {now.run.name}, and {folder} goes on under its own: leave it out, or --fork it"
        )
    if now.run.out != was.run.out and Path(now.run.out).resolve() != folder.resolve().parent:
        raise job.InputError(f"--out is {now.run.out}, and {folder} goes on where it is: leave it out, or --fork it")


def _train(config: Config, corpus: tuple[str, ...], options: dict[str, Any], ranks: mesh.Ranks) -> int:
    folder = options["origin"]
    if ranks.restarts and ranks.folder:  # torchrun started all ranks again: the run goes on
        options["resume"], folder = ranks.folder, Path(ranks.folder)
        config, corpus = job.read_config(folder)  # --init has filled in its shape
    say = console.say if ranks.first else lambda text: None
    if folder is not None:
        was = job.read_config(folder)[0]
        if options["resume"]:
            check_place(folder, was, config)
        for line in was.differences(config):
            say(f"changed: {line}")
        go = job.resume if options["resume"] else job.fork
        with reading() as note:
            made = go(folder, config, corpus, other_data=options["other_data"], say=console.say, note=note, ranks=ranks)
    else:
        with reading() as note:
            made = job.start(config, corpus, note=note, ranks=ranks)
    result = made.run()
    say(f"run folder: {result.folder}")
    if result.why.startswith("pause"):
        return launch.PAUSED
    if result.why.startswith("signal"):
        name = result.why.split()[-1]
        if ranks.first:
            console.warn(
                f"fastlm train: stopped by {name} at step {made.trainer.step}, which is saved; go on with "
                f"fastlm train --resume {Path(result.folder)}"
            )
        return 128 + int(getattr(signal, name))
    return 0
