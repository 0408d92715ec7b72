"""A language-model run from start to end: corpus, model, trainer, then what it reached beside what counting reaches.

`start` makes a new run's folder, `resume` goes on in one, `load` opens one for generating and evaluating.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlm import backend
from fastlm.console import say, warn
from fastlm.data import InputError, Options, Prepared, TokenSource, chat, corpus_batches, prepare
from fastlm.data import tokenizer as tokenizers
from fastlm.data.baselines import baselines
from fastlm.data.bounds import flag
from fastlm.data.card import policies
from fastlm.data.mixing import prepare_each
from fastlm.data.prepare import Note, cache_folder, held, silent, strangers
from fastlm.models.gpt import GPT
from fastlm.train import base, checkpoint, export, lock, lora, modelcard, parallel, reference, report, state, waiting
from fastlm.train.callbacks import Picture, Samples, standard
from fastlm.train.config import Config, DataConfig, told_shape
from fastlm.train.costs import Costs
from fastlm.train.folders import find_init, forked_from, new_folder, write_config
from fastlm.train.folders import find_run as find_run  # for those who use jobs
from fastlm.train.folders import read_config as read_config
from fastlm.train.generation import generate, sampler
from fastlm.train.loop import Trainer, pair_options
from fastlm.train.machine import apply, autocast, memory_limit, pick_device, spare_page_faults
from fastlm.train.ranks import Ranks, SingleProcess

# ------------------------------------------------------------------------------------------------------------- the parts


def options_of(config: DataConfig, context: int) -> Options:
    c = config
    pack = context if c.packing == "documents" or c.rows else 0
    return Options(
        c.tokenizer, c.vocab, c.special_tokens, c.field, c.separator, c.val_fraction, pack, c.workers, c.rows, c.chat_template,
        c.fold, c.fraction,
    )  # fmt: skip


def read_data(
    corpus: tuple[str, ...],
    config: DataConfig,
    context: int,
    note: Note = silent,
    kept: tokenizers.Tokenizer | None = None,
) -> list[Prepared]:
    """One prepared corpus, or one for each name when weights mix them. `context` counts when documents are packed; `kept`
    is the tokenizer of a run that goes on, in place of one that would be learnt again."""
    options = options_of(config, context)
    without = held([(path,) for path in _named_sets(config).values()], options, note=note)
    if not config.weights:
        return [prepare(corpus, options, kept=kept, without=without, note=note)]
    if len(config.weights) != len(corpus) or min(config.weights) <= 0:
        raise InputError(f"--weights needs one positive weight per corpus: {len(config.weights)} for {len(corpus)}")
    return prepare_each(corpus, options, kept, without, note)


def check_groups(
    data: list[Prepared], corpus: tuple[str, ...], config: DataConfig, context: int, note: Note = silent
) -> None:
    """Warn of rows whose group is the hash of no text that is trained or validated on. `data` is the prepared corpus."""
    if not any(one.manifest["split"].endswith("groups") for one in data):
        return
    apart = [(name,) for name in corpus] if config.weights else [corpus]
    named = [(path,) for path in _named_sets(config).values()]
    strange, every = strangers([*apart, *named], options_of(config, context), note=note)
    if strange:
        warn(
            f"{strange:,} of {every:,} groups of rows name no document or block of this corpus, so what was made from a "
            f"held-out text may be trained on: augment the very corpus that is trained on, and give both together"
        )


def _named_sets(config: DataConfig) -> dict[str, str]:
    """--val's NAME=PATH by name. Raises InputError for what is no such pair, or a name given twice."""
    found: dict[str, str] = {}
    for given in config.val:
        name, _, path = given.partition("=")
        if not name.isidentifier() or not path or name in found:
            raise InputError(f"--val takes NAME=PATH, each name (letters, digits, _) once; it is {given!r}")
        found[name] = path
    return found


def tuned(data: list[Prepared]) -> Iterator[str]:
    """What is trained of rows that are fine-tuned on, a line."""
    rows = [one.manifest for one in data if one.kind]
    if not rows:
        return
    trained, tokens = (sum(m[side][key] for m in rows for side in ("train", "val")) for key in ("targets", "tokens"))
    cut = sum(m["cut"] for m in rows)
    line = f"rows: {trained:,} of {tokens:,} tokens are trained on ({trained / tokens:.1%}); fastlm data show N shows which"
    yield line + (f"; {cut:,} were longer than the context and are cut at its end" if cut else "")


def read_validation(
    config: DataConfig, context: int, tokenizer: tokenizers.Tokenizer, note: Note = silent
) -> dict[str, Prepared]:
    """The further validation sets by name, none of which is split."""
    options = options_of(config, context)
    return {
        name: prepare((path,), options, tokenizer=tokenizer, whole=True, note=note)
        for name, path in _named_sets(config).items()
    }


def validation(
    data: list[Prepared],
    config: Config,
    context: int,
    device: torch.device,
    named: dict[str, Prepared] | None = None,
    ranks: Ranks | None = None,
) -> Any:
    """A function (model, whole) -> val_loss in nats per token and val_bpb in bits per byte of text, over the validation
    sides of `data`; and the same for each further set, as val_NAME_loss and val_NAME_bpb.

    Batch i falls to data rank i modulo their number. Batches are the same and their losses are added in the same order
    whatever that number is, so of the same weights it is the same number, to the bit where a forward is.
    """
    rows, ranks = max(16384 // context, 1), ranks or SingleProcess()
    pairs = pair_options(config)

    def over(model: nn.Module, corpora: list[Prepared], whole: bool) -> tuple[float, float, int]:
        loss = lambda batch: float(model(*(t.to(device) for t in batch)))
        losses: list[float] = []
        count, size = 0, 0.0
        for corpus in corpora:
            limit = 0 if whole else config.run.eval_tokens // len(corpora)
            mine = 0
            for batch in corpus_batches(corpus, context, rows, limit):
                own = len(losses) % ranks.size_of_data == ranks.data_rank
                losses.append(loss(batch) if own else 0.0)
                mine += int((batch[1] != -100).sum())
            count += mine
            size += mine * corpus.bytes_per_target("val")
        if 0 < len(losses) % ranks.size_of_data <= ranks.data_rank:
            loss(batch)  # the last round is not full: the forward of a cut model needs every rank
        if ranks.size > 1:
            losses = ranks.sum(torch.tensor(losses, dtype=torch.float64, device=device)).tolist()
        total = math.fsum(losses)
        return total / count, total / size / math.log(2), count

    def compared(model: nn.Module, corpora: list[Prepared], whole: bool) -> tuple[float, float, int]:
        """(nats a pair, share of pairs the right way round, pairs) of preferences."""
        judged = lambda batch: model(*(t.to(device) for t in batch), wins=True, **pairs).cpu().double()
        sums, count, number = torch.zeros(2, dtype=torch.float64), 0, 0
        for corpus in corpora:
            limit = 0 if whole else config.run.eval_tokens // len(corpora)
            for batch in corpus_batches(corpus, context, max(rows // 2, 1), limit):
                if number % ranks.size_of_data == ranks.data_rank:
                    sums += judged(batch)
                number += 1
                count += int((batch[2][::2] + 1).masked_fill(batch[1][::2] < 0, 0).amax(1).sum())
        if 0 < number % ranks.size_of_data <= ranks.data_rank:
            judged(batch)
        if ranks.size > 1:
            sums = ranks.sum(sums.to(device)).cpu()
        return float(sums[0]) / count, float(sums[1]) / count, count

    def measured(model: nn.Module, corpora: list[Prepared], whole: bool, name: str) -> dict[str, float]:
        if corpora[0].kind == "dpo":
            loss, share, count = compared(model, corpora, whole)
            return {f"{name}_loss": loss, f"{name}_accuracy": share, f"{name}_pairs": count}
        loss, bits, count = over(model, corpora, whole)
        return {f"{name}_loss": loss, f"{name}_bpb": bits} | ({"val_tokens": count} if name == "val" else {})

    def run(model: nn.Module, whole: bool) -> dict[str, float]:
        found = measured(model, data, whole, "val")
        for name, corpus in (named or {}).items():
            found |= measured(model, [corpus], whole, f"val_{name}")
        return found

    return run


# -------------------------------------------------------------------------------------------------------------- the runs


@dataclass
class Result:
    folder: Path
    why: str
    val: dict[str, float]
    counted: dict[str, float]


class Job:
    """Data, model and trainer of one run."""

    starts_at: Path | None = None  # another run's checkpoint, which becomes this one's first

    def __init__(
        self,
        config: Config,
        corpus: tuple[str, ...],
        folder: Path | None = None,
        note: Any = None,
        ranks: Ranks | None = None,
        origin: Path | None = None,
        fork: Path | None = None,
    ) -> None:
        """Into `folder`, or a new one. `origin` is the run whose checkpoint comes next, which then gives the weights;
        `fork` that checkpoint, if the run starts from another's."""
        config.check()
        waiter = waiting.parent()
        if config.run.when and waiter is None and (ranks is None or ranks.first):
            warn("--when is of no effect here: it is the command fastlm train that waits, and starts what trains")
        config = copy.deepcopy(config)  # --init fills in the shape
        spare_page_faults()
        apply(config.run)
        standard(config.run)  # a package that a flag needs and that is missing is named before there is a folder
        self.config, self.corpus, self.ranks = config, corpus, ranks or SingleProcess()
        first = self.ranks.first
        parallel.check(config, self.ranks.sizes)
        if origin is not None:
            check_model(config, origin, new=folder is None)
        self.device = self.ranks.device or pick_device(config.run.device)
        if config.run.kernels == "fused" and backend.forced():  # said before data are prepared and a folder is made
            for op in ("attention", "dropout_add_norm"):
                backend.which(op, **backend.example(op, self.device.type))
        # once more when the vocabulary is known; but bytes and BPE have 256 at least, and preparing data may take hours
        if not config.model.init and config.data.tokenizer != "chars":
            least = Costs.of(config.model.resolve(256), config, self.device.type, self.ranks.sizes)
            check_memory(least, self.device, self.ranks)
        note = note if note is not None and first else silent
        given = None
        if config.model.init and origin is None:
            config.model.init = str(find_init(config.model.init, config.run.out))
            given = export.read_model(Path(config.model.init), floats=not config.model.lora_rank)
            config.model.take_shape(given.shape)
        if config.data.rows:  # of a run that goes on it is known
            init = Path(config.model.init) if config.model.init else None
            config.data.chat_template = chat.resolve(config.data.chat_template, init)
        context = config.model.length()
        kept = self.kept = None if origin is None else own_tokenizer(origin, config)
        self.data = self.ranks.in_turn(  # the others find it prepared
            lambda: read_data(corpus, config.data, context, note, kept)
        )
        self.ranks.in_turn(lambda: check_groups(self.data, corpus, config.data, context, note) if first else None)
        tokenizer = self.data[0].tokenizer
        self.named = self.ranks.in_turn(lambda: read_validation(config.data, context, tokenizer, note))
        if given is not None:
            check_tokenizer(config, tokenizer, given)
        self.shape = config.model.resolve(tokenizer.vocab)
        self.source = TokenSource(self.data, self.shape.context, config.run.seed, config.data.weights)
        self.int8, where = None if given is None else given.int8, config.model.init
        tensors = {} if given is None else {**given.tensors, **given.masks}
        if config.model.lora_rank and origin is not None:
            (tensors, self.int8), where = export.base_tensors(origin, floats=False), str(origin / lora.BASE)
        frozen = self.int8 if config.model.lora_rank else None  # else they train in float
        self.costs = Costs.of(self.shape, config, self.device.type, self.ranks.sizes, frozen)
        check_memory(self.costs, self.device, self.ranks)
        state.seed_all(config.run.seed)
        model = base.build(self.shape, tensors, frozen, where)
        tensors = state.model_tensors(model)
        self.references = self._references(model, origin)
        if config.model.lora_rank:
            lora.apply(model, config.model.lora_rank, config.model.lora_alpha, config.model.lora_targets)

        # a new run's folder is made now and is its own until `begin`; nothing of an older one's changes before that
        self.new, self.begun, self.origin_of_fork = folder is None, False, fork
        self.owner: lock.Lock | None = None  # of a new run's folder; the first rank's
        self.folder = self.ranks.share(self.ranks.in_turn(lambda: folder or self._new_folder()))
        try:
            self.base: dict[str, torch.Tensor] | None = None
            if config.model.lora_rank and self.folder != origin:
                self._keep_base(tensors)
            self.trainer = Trainer(
                config,
                model,
                self.source,
                self.folder,
                evaluate=validation(self.data, config, self.shape.context, self.device, self.named, self.ranks),
                callbacks=[
                    Picture(),
                    *([Samples(self.sample)] if config.run.sample else []),
                    *([waiting.Waiting(config.run, waiter)] if config.run.when and waiter else []),
                ],
                ranks=self.ranks,
                flops_per_sample=self.costs.flops_per_sample,
                begin=self.begin,
            )
            if self.new:
                self.trainer.owned.take_over(self.owner)
        except BaseException:
            self.withdraw()
            raise
        self.model = model

    def _references(self, model: GPT, origin: Path | None) -> reference.Known:
        """Of --dpo what the model as it is before its first step gives the pairs; of a run that goes on, what it began with."""
        sets = [*self.data, *self.named.values()]
        if not any(one.kind == "dpo" for one in sets):
            return {}
        started, known = time.perf_counter(), reference.Known()
        weights = ""
        if origin is None:
            weights = reference.weights_hash(state.model_tensors(model), self.shape, self.config.run.dtype)
        else:
            known = self.ranks.in_turn(lambda: reference.read(origin / reference.FILE))
        of = None if origin is not None else model
        found, added = reference.attach(sets, of, weights, known, self.ranks, self.device, self.config.run.dtype)
        for one, part in zip(self.data, self.source.parts):
            part.reference = one.references["train"]  # type: ignore[union-attr]
        seconds = time.perf_counter() - started
        self.said = (
            f"reference: {len(found):,} pairs, {added:,} computed now, the others found on disk; {seconds:.1f} s"
        )
        return found

    def _new_folder(self) -> Path:
        if not self.ranks.first:
            return Path()
        folder, self.owner = new_folder(self.config)
        return folder

    def _keep_base(self, base: dict[str, torch.Tensor]) -> None:
        """The frozen weights beside LoRA's, written once. A folder that is a run's already gets them when it goes on."""
        if not self.ranks.first:
            return
        if self.new:
            self._write_base(base)
        else:
            self.base = {name: t.detach().clone() for name, t in base.items()}

    def _write_base(self, tensors: dict[str, torch.Tensor]) -> None:
        texts = {lora.INT8: self.int8.facts()} if self.int8 is not None else {}
        checkpoint.write_base(self.folder / lora.BASE, tensors, texts)

    def begin(self) -> None:
        """Write what the run is into its folder. `fit` calls it when nothing can refuse the run any more."""
        if self.begun:
            return
        self.ranks.in_turn(lambda: self._write_folder() if self.ranks.first else None)
        self.ranks.remember(str(self.folder))
        self.begun = True
        if self.starts_at is not None:
            self.trainer.begin_own()

    def _write_folder(self) -> None:
        if self.base is not None:
            self._write_base(self.base)
            self.base = None
        checkpoint.clean(self.folder)
        if self.references:
            reference.write(self.folder / reference.FILE, self.references)
        report.write_facts(self.folder, self.facts())
        # the last that may refuse: a folder with config.json is a run's that has begun
        write_config(self.folder, self.config, self.corpus, self.shape, self.data, self.origin_of_fork)

    def withdraw(self) -> None:
        """Give the run up: the folder of a new one that has not begun, and that no other process has, is removed."""
        if self.owner is None or not self.owner.held:
            return
        if not self.begun and not (self.folder / "config.json").exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.owner.release()

    def sample(self, count: int) -> str:
        """Text of the model as it stands, with the weights and in the type that evaluations use."""
        # A compiled model would be compiled again for every length that its cache grows to.
        averaged, typed = self.trainer.averaged(), autocast(self.device, self.config.run.dtype)
        with averaged, typed, torch.compiler.set_stance("force_eager"):
            choose = sampler(0.8, seed=self.config.run.seed, vocab=self.data[0].tokenizer.vocab)
            return generate(self.model, self.data[0].tokenizer, "", count, choose)

    def finish(self, why: str, say: Callable[[str], None]) -> Result:
        """What the run reached: written to result.json and report.html first, then said."""
        trainer, found = self.trainer, dict(self.trainer.latest)
        ended = not why.startswith(("signal", "pause"))
        if why.startswith("early"):
            found = {}  # the best weights are restored
        if ended and not found.get("whole"):
            found = {"step": trainer.step, "whole": True, **trainer.measure(whole=True)}
        counted: dict[str, float] = {}
        text = ""
        if ended:
            corpus = self.data[0]
            if self.ranks.first and not corpus.kind:  # a prompt is no part of what is predicted there
                counted = baselines(corpus.text("train", 32 << 20), corpus.text("val", 8 << 20))
            counted = self.ranks.share(counted)
            text = self.sample(self.config.run.sample)
        result = {"why": why, "step": trainer.step, "val": found, "counted": counted, "best": trainer.best}
        if self.ranks.first:
            modelcard.close(self.folder, result, text if ended else None)
        for line in self._reached(why, found, counted, text):
            say(line)
        return Result(self.folder, why, found, counted)

    def _reached(self, why: str, found: dict[str, Any], counted: dict[str, float], text: str) -> Iterator[str]:
        best = self.trainer.best
        if why.startswith("early"):
            restored = f"the best weights, of step {best['step']}, are restored" if best else "none was finite"
            yield f"stopped {why}; {restored}"
        if not why.startswith(("signal", "pause")):
            yield f"\na sample:\n{text}\n"
            yield f"validation loss {_told(found, 'val')}"
            for name in self.named:
                yield f"{name}: {_told(found, f'val_{name}')}"
            others = ", ".join(f"{name} {bits:.3f}" for name, bits in counted.items())
            if others:
                where = "counted on the training text; zlib on the validation text"
                yield f"for comparison, in bits per byte: {others} ({where})"
        yield f"report: {self.folder / 'report.html'}"

    def run(self, say: Callable[[str], None] = say) -> Result:
        """Train to the end, which `fit` says, and write what came of it. No other process trains the run meanwhile."""
        say = say if self.ranks.first else lambda text: None
        with self.trainer.owned.held():
            try:
                self._announce(say)
                return self.finish(self._fit(), say)
            except BaseException:
                self.withdraw()
                raise

    def _announce(self, say: Callable[[str], None]) -> None:
        d, c = self.data[0].manifest, self.costs
        if self.int8 is not None:
            how = (
                "its int8 layers stay as they are"
                if self.config.model.lora_rank
                else ("training starts at its dequantised weights, in float (--lora-rank keeps them in int8)")
            )
            say(f"--init is an int8 model: {how}")
        say(
            f"corpus: {d['documents']:,} documents, {d['train']['tokens']:,} training and {d['val']['tokens']:,} validation "
            f"tokens (split by {d['split']})"
        )
        for line in [*tuned(self.data), *([self.said] if self.references else [])]:
            say(line)
        if d["undecodable"]:
            how = "kept as they are" if d["tokenizer"]["kind"] == "bytes" else "read as U+FFFD"
            say(f"{d['undecodable']:,} texts are not UTF-8 throughout; what cannot be decoded is {how}")
        say(
            f"model: {c.parameters / 1e6:.2f} M parameters, {c.flops_per_sample * self.config.optim.batch / 1e9:.1f} GFLOP a "
            f"step, about {c.memory / 2**20:,.0f} MiB; {self.device}, {torch.get_num_threads()} threads"
            + (f", {self.ranks.size} processes" if self.ranks.size > 1 else "")
        )
        if self.trainer.kernels.table is not None:
            say(str(self.trainer.kernels.table))
        if self.config.run.kernels == "fused" and self.device.type == "mps":
            say("fastlm has no kernels for mps: PyTorch's own run")
        say(f"run: {self.folder}")

    def _fit(self) -> str:
        try:
            return self.trainer.fit()
        except InputError as error:  # it says why training cannot go on: the report says it too
            if self.ranks.first and self.begun:
                result = {"why": str(error), "step": self.trainer.step, "best": self.trainer.best}
                try:
                    report.write_result(self.folder, result)
                    report.write(self.folder)
                except InputError as another:  # a full disk refuses the report too, but is not why training ended
                    warn(str(another))
            raise

    def facts(self) -> dict[str, Any]:
        """What the report tells of the run and no other file of it does."""
        c, table = self.costs, self.trainer.kernels.table
        return {
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "ranks": self.ranks.size,
            "torch": str(torch.__version__),
            "parameters": c.parameters,
            "trained": c.trained,
            "flops_per_step": c.flops_per_sample * self.config.optim.batch,
            "memory": c.parts,
            "energy": self.trainer.energy.facts(),
            "policies": policies.of_corpus(self.corpus),
            "swap": str(table) if table is not None else "PyTorch's own kernels (--kernels torch)",
        }


def _told(found: dict[str, Any], name: str) -> str:
    """A measured set in words."""
    loss = found[f"{name}_loss"]
    if f"{name}_accuracy" in found:
        return f"{loss:.4f} nats per pair, {found[f'{name}_accuracy']:.1%} of the pairs the right way round"
    return f"{loss:.4f} nats per token, {found[f'{name}_bpb']:.4f} bits per byte"


def start(config: Config, corpus: tuple[str, ...] = (), note: Any = None, ranks: Ranks | None = None) -> Job:
    return Job(config, corpus, note=note, ranks=ranks)


def resume(
    folder: Path,
    config: Config,
    corpus: tuple[str, ...],
    *,
    other_data: bool,
    say: Any,
    note: Any = None,
    ranks: Ranks | None = None,
    fork: bool = False,
) -> Job:
    """The job of a run's folder at its last whole checkpoint, or from the start when it has none (a fork that was killed
    before its first save: where it forked); with `fork` a new run that starts at that checkpoint.

    The run is this process's own until its end; InputError where another one trains it. Its files change when it goes on.
    """
    ranks = ranks or SingleProcess()
    say = say if ranks.first else lambda text: None
    own = ranks.in_turn(lambda: lock.take(folder) if ranks.first and not fork else None)
    made: Job | None = None
    try:
        if ranks.first and not fork:
            checkpoint.recover(folder)
        earlier = None if fork else forked_from(folder)
        wanted = ranks.first and (fork or checkpoint.steps(folder))
        found = ranks.share(ranks.in_turn(lambda: checkpoint.newest(folder, say) if wanted else None))
        start = found if fork else None
        if found is None and earlier is not None:
            found = start = earlier
            say(f"{folder} holds no checkpoint yet: it starts once more from {earlier}")
        origin = folder if found is not None else None
        into, born = None if fork else folder, start or earlier
        made = Job(config, corpus, folder=into, note=note, ranks=ranks, origin=origin, fork=born)
        if not fork:
            made.trainer.owned.take_over(own)
        if fork and not ranks.share(found is not None and found.exists()):  # its run trains on, and has removed it
            found = start = ranks.share(ranks.in_turn(lambda: checkpoint.newest(folder, say) if ranks.first else None))
            made.origin_of_fork = found
        if found is not None:
            made.trainer.restore(found, other_data=other_data, verified=found != earlier)
        if start is not None:
            made.trainer.best, made.trainer.waited = {}, 0  # what this folder holds counts
            made.starts_at = start
    except BaseException:
        if made is not None:
            made.withdraw()
        if own is not None:
            own.release()
        raise
    step, tokenizer = made.trainer.step, made.data[0].tokenizer
    if made.kept is not None:
        say(f"tokenizer: the run's own, {tokenizer.spec()['kind']} of {tokenizer.vocab:,} tokens")
    say(f"a new run from step {step} of {folder}" if fork else f"going on from step {step} of {config.optim.steps}")
    return made


fork = functools.partial(resume, fork=True)


def check_memory(costs: Costs, device: torch.device, ranks: Ranks) -> None:
    """InputError unless what the ranks of this machine need fits it; a GPU belongs to one rank."""
    limit, sharing = memory_limit(device), 1 if device.type == "cuda" else ranks.on_host
    if limit and costs.memory * sharing > limit:
        each = f" ({sharing} processes of {costs.memory / 2**30:.1f})" if sharing > 1 else ""
        raise InputError(
            f"training this model takes about {costs.memory * sharing / 2**30:.1f} GiB{each} and the machine has "
            f"{limit / 2**30:.1f}: choose a smaller --size, --micro, fewer processes, or --recompute full"
        )


def check_model(config: Config, origin: Path, *, new: bool) -> None:
    """InputError, naming the flag, where the run of `origin` has another model; `new` where it is forked.

    A run that goes on compares its losses with those before, so what its model computes stays; a fork may change it.
    """
    rows = read_config(origin)[0].data.rows
    if rows != config.data.rows:
        has = f"--{rows}" if rows else "without it"
        raise InputError(
            f"--{config.data.rows or rows} is for a new run, and {origin} trains {has}: give --init {origin} in the place of "
            f"--resume or --fork"
        )
    was, now = read_config(origin)[0].model, config.model
    free = {"dropout", "lora_alpha"} | ({"eps", "rope_base"} if new else set())
    shape = was.resolve(was.rows or 256)
    if shape.position == "rotary":  # what is read with another context is other data
        free.add("context")
    told = told_shape(shape) | {"rows": was.rows}
    for one in dataclasses.fields(now):
        mine, given = getattr(was, one.name), getattr(now, one.name)
        if mine == given or one.name in free:
            continue
        if one.name == "init":
            raise InputError(f"--init gives a new run its weights, and {origin} has weights: leave it out")
        alone = dataclasses.replace(was, **{one.name: given})
        if one.name.startswith("lora") or alone.resolve(alone.rows or 256) != shape:
            has = told.get(one.name, getattr(shape, one.name, mine))
            raise InputError(
                f"{flag(one.name)} is {given}, and the model of {origin} has {has}: leave it out, or train a new run"
            )


def check_tokenizer(config: Config, tokenizer: tokenizers.Tokenizer, given: export.Source) -> None:
    """InputError unless the data's tokens mean to the model of --init what they meant in its training."""
    init = config.model.init
    if tokenizer.vocab > given.shape.vocab:
        raise InputError(
            f"--init {init} knows {given.shape.vocab} tokens and the tokenizer {config.data.tokenizer} makes "
            f"{tokenizer.vocab}: give --tokenizer the tokenizer.json that belongs to the model"
        )
    known = given.tokenizer
    if known is None and config.data.tokenizer == DataConfig().tokenizer and tokenizer.vocab != given.shape.vocab:
        own_one = tokenizer_of(Path(init))  # nobody has asked for bytes, perhaps: what the folder tells, or its refusal
        raise InputError(f"--init {init} has a tokenizer of its own: --tokenizer {own_one} takes it")
    if known is None or known == tokenizer.spec():
        return
    own = tokenizer.spec().get("content")
    if own is None or own not in (known.get("content"), export.tokenizer_json(known)):
        raise InputError(
            f"--init {init} was trained with another tokenizer ({known['kind']}) than --tokenizer "
            f"{config.data.tokenizer}: its numbers would mean other text; leave --tokenizer out to take its own"
        )


def tokenizer_of(init: Path) -> str:
    """What --tokenizer is where --init is given and it is not: the model's own. InputError where its folder does not tell."""
    advice = "give --tokenizer what the model was trained with, such as its tokenizer.json"
    try:
        spec = export.read_tokenizer(init)
    except InputError as error:
        raise InputError(f"--init {init}: {error}; or {advice}") from None
    if spec is None:
        raise InputError(f"--init {init} holds no tokenizer, so there is no telling what its tokens mean: {advice}")
    if spec["kind"] == "bytes":
        return "bytes"
    path = (init.parent.parent if (init / "state.json").is_file() else init) / "tokenizer.json"
    if not path.is_file():
        content = export.tokenizer_json(spec)
        path = cache_folder() / "tokenizers" / f"{tokenizers.load(spec).hash}.json"
        if not path.is_file():  # each rank comes here
            path.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(path, content)
    return str(path)


def own_tokenizer(folder: Path, config: Config) -> tokenizers.Tokenizer | None:
    """The tokenizer of a run that goes on or is forked, which reads text as the configuration says; None where that asks for
    another than the run has."""
    was, now = read_config(folder)[0].data, config.data
    if (was.tokenizer, was.vocab) != (now.tokenizer, now.vocab):
        return None
    spec = export.read_tokenizer(folder)
    return None if spec is None else tokenizers.load(spec, now.special_tokens)


def load(folder: Path, device: str = "auto", special_tokens: str = "") -> tuple[GPT, tokenizers.Tokenizer]:
    """Model (of a run its best weights, in eval mode) and tokenizer of a run, checkpoint or exported folder.

    `special_tokens`: whether text holds any (text or read), where it is not what the run was trained with.
    """
    found = export.read_model(folder, floats=False)
    spec = found.tokenizer or export.read_tokenizer(folder)
    if spec is None:
        raise InputError(f"{folder} holds no tokenizer.json, so there is no telling what its tokens mean")
    model = base.build(found.shape, found.tensors, found.int8, folder)
    return model.to(pick_device(device)).eval(), tokenizers.load(spec, special_tokens)
