"""A language-model run from start to end: corpus, model, trainer, then what it reached beside what counting reaches.

`start` makes a new run's folder, `resume` goes on in one, `load` opens one for generating and evaluating.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.data import InputError, Options, Prepared, TokenSource, corpus_batches, prepare
from fastlm.data import tokenizer as tokenizers
from fastlm.data.baselines import baselines
from fastlm.data.prepare import Note, joint_tokenizer, silent
from fastlm.models.gpt import GPT, GPTConfig
from fastlm.train import checkpoint, state
from fastlm.train.callbacks import Callback, Picture, Progress, Tensorboard
from fastlm.train.config import Config, DataConfig
from fastlm.train.loop import Trainer
from fastlm.train.machine import memory_limit, pick_device, spare_page_faults
from fastlm.train.mesh import Ranks

# --------------------------------------------------------------------------------------------------------------- folders


def new_folder(config: Config, first: bool = True) -> Path:
    """runs/NAME, made now; a folder that is there already is never written into."""
    name = config.run.name or time.strftime("%Y%m%d-%H%M%S")
    folder, number = Path(config.run.out) / name, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if config.run.name:
                raise InputError(
                    f"the run {folder} exists and is not overwritten: choose another --name, or --resume {folder}"
                ) from None
            number += 1
            folder = Path(config.run.out) / f"{name}-{number}"
        except OSError as error:
            raise InputError(f"cannot make the run's folder {folder}: {error.strerror}") from error


def find_run(name: str | None, out: str = "runs") -> Path:
    """The folder of a run by path or name; without one, the run that was written to last."""
    if name:
        for folder in (Path(name), Path(out) / name):
            if (folder / "config.json").is_file():
                return folder
        raise InputError(f"there is no run {name} (a folder with config.json, here or in {out}/)")
    runs = [p.parent for p in Path(out).glob("*/config.json") if checkpoint.steps(p.parent)]
    if not runs:
        raise InputError(f"{out}/ holds no run with a checkpoint; train one first, or name its folder")
    return max(runs, key=lambda folder: max(p.stat().st_mtime for _, p in checkpoint.steps(folder)))


def read_config(folder: Path) -> tuple[Config, tuple[str, ...]]:
    try:
        saved = json.loads((folder / "config.json").read_text())
        return Config.from_dict(saved["config"]), tuple(saved["corpus"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error}") from None


def write_config(folder: Path, config: Config, corpus: tuple[str, ...], model: GPTConfig, data: list[Prepared]) -> None:
    where = [str(Path(c).resolve()) if Path(c).exists() else c for c in corpus]
    saved = config.to_dict()
    pairs = [given.partition("=") for given in config.data.val]
    saved["data"]["val"] = [f"{n}={Path(p).resolve() if Path(p).exists() else p}" for n, _, p in pairs]
    body = {
        "config": saved,
        "corpus": where,
        "model": dataclasses.asdict(model),
        "tokenizer": data[0].tokenizer.spec(),
        "data": [
            {"content": d.content, **{k: d.manifest[k] for k in ("documents", "split", "train", "val")}} for d in data
        ],
    }
    draft = folder / ".config.draft"
    try:
        draft.write_text(json.dumps(body, indent=1))
        os.replace(draft, folder / "config.json")
    except OSError as error:
        raise InputError(f"cannot write {folder / 'config.json'}: {error.strerror}") from error


# ------------------------------------------------------------------------------------------------------------- the parts


def options_of(config: DataConfig, context: int) -> Options:
    pack = context if config.packing == "documents" else 0
    c = config
    return Options(c.tokenizer, c.vocab, c.field, c.separator, c.val_fraction, pack, c.workers)


def read_data(corpus: tuple[str, ...], config: DataConfig, context: int, note: Note = silent) -> list[Prepared]:
    """One prepared corpus, or one for each name when weights mix them. `context` counts when documents are packed."""
    options = options_of(config, context)
    if not config.weights:
        return [prepare(corpus, options, note=note)]
    if len(config.weights) != len(corpus) or min(config.weights) <= 0:
        raise InputError(f"--weights needs one positive weight per corpus: {len(config.weights)} for {len(corpus)}")
    tokenizer = joint_tokenizer([(name,) for name in corpus], options, note=note)
    return [prepare((name,), options, tokenizer=tokenizer, note=note) for name in corpus]


def read_validation(
    config: DataConfig, context: int, tokenizer: tokenizers.Tokenizer, note: Note = silent
) -> dict[str, Prepared]:
    """The further validation sets by name, none of which is split."""
    found: dict[str, Prepared] = {}
    for given in config.val:
        name, _, path = given.partition("=")
        if not name.isidentifier() or not path or name in found:
            raise InputError(f"--val takes NAME=PATH, each name (letters, digits, _) once; it is {given!r}")
        options = options_of(config, context)
        found[name] = prepare((path,), options, tokenizer=tokenizer, whole=True, note=note)
    return found


@dataclass(frozen=True)
class Costs:
    """What a model and its training take, before the first step."""

    parameters: int
    flops_per_sample: float
    memory: int

    @classmethod
    def of(cls, model: GPTConfig, config: Config) -> Costs:
        c, head = model, model.width // model.heads
        attn = c.width * (c.heads + 2 * (c.kv_heads or c.heads)) * head + c.width * c.width
        mlp = c.width * c.mlp_width * (3 if c.mlp == "swiglu" else 2)
        table = c.vocab * c.width
        extra = (c.context * c.width if c.position == "learned" else 0) + (0 if c.tied else table)
        parameters = c.layers * (attn + mlp) + table + extra
        # 2 flops per weight and token forward, twice that backward; attention's two products, causal: half
        per_token = 6 * (c.layers * (attn + mlp) + table) + 6 * c.layers * c.context * c.width
        micro = config.optim.micro or config.optim.batch
        moments = 3 if config.optim.optimizer == "adamw" else 2
        size = 4 if config.run.dtype == "float32" else 2
        kept = {"none": 1.0, "half": 0.55, "full": 0.1}[config.run.recompute]
        activations = micro * c.context * (c.layers * (14 * c.width + 4 * c.mlp_width) * kept + 4 * c.width) * size
        memory = parameters * 4 * (1 + moments + bool(config.optim.ema)) + int(activations)
        return cls(parameters, per_token * c.context, memory)


def validation(
    data: list[Prepared], config: Config, context: int, device: torch.device, named: dict[str, Prepared] | None = None
) -> Any:
    """A function (model, whole) -> val_loss in nats per token and val_bpb in bits per byte of text, over the validation
    sides of `data`; and the same for each further set, as val_NAME_loss and val_NAME_bpb."""
    rows = max(16384 // context, 1)

    def over(model: nn.Module, corpora: list[Prepared], whole: bool) -> tuple[float, float, int]:
        total, count, size = 0.0, 0, 0.0
        for corpus in corpora:
            limit = 0 if whole else config.run.eval_tokens // len(corpora)
            mine = 0
            for tokens, targets, *documents in corpus_batches(corpus, context, rows, limit):
                total += float(model(tokens.to(device), targets.to(device), *(d.to(device) for d in documents)))
                mine += int((targets != -100).sum())
            count += mine
            size += mine * corpus.manifest["val"]["bytes"] / corpus.manifest["val"]["tokens"]
        return total / count, total / size / math.log(2), count

    def run(model: nn.Module, whole: bool) -> dict[str, float]:
        loss, bits, count = over(model, data, whole)
        found: dict[str, float] = {"val_loss": loss, "val_bpb": bits, "val_tokens": count}
        for name, corpus in (named or {}).items():
            found[f"val_{name}_loss"], found[f"val_{name}_bpb"], _ = over(model, [corpus], whole)
        return found

    return run


def sampler(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 1
) -> Callable[[Tensor], Tensor]:
    """Logits [B, V] to tokens [B]. Temperature 0 takes the likeliest; the filters apply in the order of the arguments."""
    generator = torch.Generator().manual_seed(seed)

    def sample(logits: Tensor) -> Tensor:
        h = logits.float().cpu()
        if temperature == 0:
            return h.argmax(-1).to(logits.device)
        h = h / temperature
        if top_k:
            h = h.masked_fill(h < h.topk(min(top_k, h.shape[-1])).values[:, -1:], -math.inf)
        p = h.softmax(-1)
        if top_p < 1:
            ranked, order = p.sort(-1, descending=True)
            ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)
            p = torch.zeros_like(p).scatter(-1, order, ranked)
        if min_p:
            p = p.masked_fill(p < min_p * p.max(-1, keepdim=True).values, 0.0)
        return torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)

    return sample


def generate(
    model: GPT, tokenizer: tokenizers.Tokenizer, prompt: str, count: int, sample: Callable[[Tensor], Tensor]
) -> str:
    device = next(model.parameters()).device
    ids = tokenizer.encode(prompt.encode()).astype("int64") if prompt else [tokenizer.eot]
    tokens = torch.as_tensor(ids, device=device)[None]
    training, _ = model.training, model.eval()
    try:
        out = model.generate(tokens, count, sample)[0].tolist()
    finally:
        model.train(training)
    return tokenizer.decode(out if prompt else out[1:]).decode("utf-8", "replace")


# -------------------------------------------------------------------------------------------------------------- the runs


@dataclass
class Result:
    folder: Path
    why: str
    val: dict[str, float]
    counted: dict[str, float]


class Job:
    """Data, model and trainer of one run."""

    def __init__(
        self,
        config: Config,
        corpus: tuple[str, ...],
        folder: Path | None = None,
        note: Any = None,
        ranks: Ranks | None = None,
    ) -> None:
        config.check()
        spare_page_faults()
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        if config.run.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.config, self.corpus, self.ranks = config, corpus, ranks or Ranks()
        first = self.ranks.first
        self.device = self.ranks.device or pick_device(config.run.device)
        note = note if note is not None and first else silent
        context = config.model.resolve(256).context
        self.data = self.ranks.in_turn(  # the others find it prepared
            lambda: read_data(corpus, config.data, context, note)
        )
        tokenizer = self.data[0].tokenizer
        self.named = self.ranks.in_turn(lambda: read_validation(config.data, context, tokenizer, note))
        self.shape = config.model.resolve(tokenizer.vocab)
        self.source = TokenSource(self.data, self.shape.context, config.run.seed, config.data.weights)
        self.costs = Costs.of(self.shape, config)
        limit = memory_limit(self.device)
        if limit and self.costs.memory > limit:
            raise InputError(
                f"training this model takes about {self.costs.memory / 2**30:.1f} GiB and the machine has "
                f"{limit / 2**30:.1f}: choose a smaller --size, --micro or --recompute full"
            )
        state.seed_all(config.run.seed)
        model = GPT(self.shape)
        callbacks: list[Callback] = [Picture()]
        callbacks += [] if config.run.quiet else [Progress()]
        callbacks += [Tensorboard()] if config.run.tensorboard else []

        def make_folder() -> Path:
            made = folder or new_folder(config)
            write_config(made, config, corpus, self.shape, self.data)
            checkpoint.clean(made)
            return made

        self.folder = self.ranks.share(self.ranks.in_turn(lambda: make_folder() if first else Path()))
        self.ranks.remember(str(self.folder))
        self.trainer = Trainer(
            config,
            model,
            self.source,
            self.folder,
            evaluate=validation(self.data, config, self.shape.context, self.device, self.named),
            callbacks=callbacks,
            ranks=self.ranks,
            flops_per_sample=self.costs.flops_per_sample,
        )
        self.model = model

    def finish(self, why: str, say: Callable[[str], None]) -> Result:
        """What the run reached, said and written to result.json."""
        trainer, found = self.trainer, dict(self.trainer.latest)
        if why.startswith("early"):
            step = int(trainer.best["step"])
            trainer.load_weights(self.folder / "checkpoints" / f"best-{step:08d}")
            say(f"stopped {why}; the best weights, of step {step}, are restored")
            found = {}
        if not why.startswith("signal") and not found.get("whole"):
            found = trainer.measure(whole=True)
        counted: dict[str, float] = {}
        if not why.startswith("signal"):
            corpus = self.data[0]
            if self.ranks.first:
                counted = baselines(corpus.text("train", 32 << 20), corpus.text("val", 8 << 20))
            counted = self.ranks.share(counted)
            text = generate(
                self.model, corpus.tokenizer, "", self.config.run.sample, sampler(0.8, seed=self.config.run.seed)
            )
            if self.ranks.first:
                (self.folder / "sample.txt").write_text(text)
            say(f"\na sample:\n{text}\n")
            say(f"validation loss {found['val_loss']:.4f} nats per token, {found['val_bpb']:.4f} bits per byte")
            for name in self.named:
                say(
                    f"{name}: {found[f'val_{name}_loss']:.4f} nats per token, {found[f'val_{name}_bpb']:.4f} bits per byte"
                )
            others = ", ".join(f"{name} {bits:.3f}" for name, bits in counted.items())
            say(
                f"for comparison, in bits per byte: {others} (counted on the training text; zlib on the validation text)"
            )
        result = {"why": why, "step": trainer.step, "val": found, "counted": counted, "best": trainer.best}
        if self.ranks.first:
            (self.folder / "result.json").write_text(json.dumps(result, indent=1))
        return Result(self.folder, why, found, counted)

    def run(self, say: Callable[[str], None] = print) -> Result:
        say = say if self.ranks.first else lambda text: None
        d, c = self.data[0].manifest, self.costs
        say(
            f"corpus: {d['documents']:,} documents, {d['train']['tokens']:,} training and {d['val']['tokens']:,} validation "
            f"tokens (split by {d['split']})"
        )
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
        say(f"run: {self.folder}")
        return self.finish(self.trainer.fit(), say)


def start(config: Config, corpus: tuple[str, ...] = (), note: Any = None, ranks: Ranks | None = None) -> Job:
    job = Job(config, corpus, note=note, ranks=ranks)
    if config.model.init:
        path = weights_of(Path(config.model.init))
        state.fill(state.model_pieces(job.trainer.layout), checkpoint.Stored(path, "model"))
    return job


def resume(
    folder: Path,
    config: Config,
    corpus: tuple[str, ...],
    *,
    other_data: bool,
    say: Any,
    note: Any = None,
    ranks: Ranks | None = None,
) -> Job:
    """The job of a run's folder at its last whole checkpoint, or from the start when it has none."""
    ranks = ranks or Ranks()
    say = say if ranks.first else lambda text: None
    if ranks.first:
        checkpoint.clean(folder)
    whole = ranks.in_turn(lambda: checkpoint.newest(folder, say) if ranks.first and checkpoint.steps(folder) else None)
    found = ranks.share(whole)
    job = Job(config, corpus, folder=folder, note=note, ranks=ranks)
    if found is not None:
        job.trainer.restore(found, other_data=other_data)
    say(f"going on from step {job.trainer.step} of {config.optim.steps}")
    return job


def fork(
    folder: Path,
    config: Config,
    corpus: tuple[str, ...],
    *,
    other_data: bool,
    say: Any,
    note: Any = None,
    ranks: Ranks | None = None,
) -> Job:
    """A new run that starts at another's last checkpoint."""
    ranks = ranks or Ranks()
    say = say if ranks.first else lambda text: None
    found = ranks.share(ranks.in_turn(lambda: checkpoint.newest(folder, say) if ranks.first else None))
    assert found is not None
    job = Job(config, corpus, note=note, ranks=ranks)
    job.trainer.restore(found, other_data=other_data)
    say(f"a new run from step {job.trainer.step} of {folder}")
    return job


def load_weights(model: nn.Module, path: Path) -> None:
    """Weights of a run (its best, else its last), a checkpoint, or a folder with model.safetensors."""
    state.load_model(model, checkpoint.Stored(weights_of(path), "model"))


def weights_of(path: Path) -> Path:
    """The folder with model.safetensors that a run, a checkpoint or such a folder means; a checkpoint is verified."""
    if (path / "config.json").is_file() and checkpoint.steps(path):
        best = checkpoint.steps(path, "best")
        path = best[-1][1] if best else checkpoint.newest(path)
    if (path / "manifest.json").is_file():
        checkpoint.verify(path)
    if not any(path.glob("model*.safetensors")):
        raise InputError(f"{path} is no run, checkpoint or folder with model.safetensors")
    return path


def load(folder: Path, device: str = "auto") -> tuple[GPT, tokenizers.Tokenizer]:
    """Model (best weights, in eval mode) and tokenizer of a run."""
    try:
        saved = json.loads((folder / "config.json").read_text())
        model, tokenizer = GPT(GPTConfig(**saved["model"])), tokenizers.load(saved["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error}") from None
    load_weights(model, folder)
    return model.to(pick_device(device)).eval(), tokenizer
