"""Configuration of a training run: documented dataclasses, from which the command line is made.

Field names are unique over all groups, since on the command line each is a flag of its own (`--lr 3e-3`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from fastlm.data.bounds import SEED, bounded, check_fields, flag, optional
from fastlm.data.errors import InputError
from fastlm.data.split import parse_fold
from fastlm.energy import EnergyError, carbon_intensity
from fastlm.models.gpt import SIZES, STYLES, GPTConfig, named
from fastlm.train import sparsity
from fastlm.train.shapes import parsed, shapes_text
from fastlm.train.shapes import told_shape as told_shape

SHAPE = ("layers", "heads", "kv_heads", "width", "hidden", "context", "tied", "bias", "eps", "rope_base", "head_size")
Size = Literal["nano", "small", "124M", "350M", "1B", "7B"]


@dataclass
class ModelConfig:
    """The model."""

    size: Size = "nano"
    """A named size; the fields below change what it says."""
    style: Literal["gpt2", "llama"] = "llama"
    """gpt2: LayerNorm, learned positions, GELU, biases. llama: RMSNorm, rotary positions, SwiGLU, no biases."""
    layers: int | None = optional(1)
    """Number of blocks."""
    heads: int | None = optional(1)
    """Query heads of each attention."""
    kv_heads: int | None = optional(1)
    """Key and value heads; fewer than heads groups the queries."""
    width: int | None = optional(1)
    """Width of the residual stream."""
    hidden: int | None = optional(1)
    """Width of the MLP."""
    context: int | None = optional(1)
    """Tokens that one sample holds."""
    dropout: float = bounded(0.0, 0, below=1)
    """Probability of dropout on embeddings, attention and both branches of a block."""
    tied: bool | None = None
    """Whether the output matrix is the embedding's."""
    bias: bool | None = None
    """Whether the linear layers (and LayerNorm) have biases."""
    eps: float | None = optional(above=0, whole=False)
    """What the norms add to the variance."""
    rope_base: float | None = optional(above=0, whole=False)
    """Base of the rotary positions' wavelengths."""
    head_size: int | None = optional(1)
    """Width of a head; without it width / heads."""
    shapes: str = ""
    """Heads/kv-heads/hidden of each layer where they differ, such as 4/4/352,2/2/128; --heads then says a head's width."""
    rows: int = bounded(0, 0)
    """Rows of the embedding, at least the tokenizer's vocabulary; 0: as many."""
    init: str = ""
    """A run, checkpoint or exported folder (transformers' GPT-2, Llama, Mistral too) to start from: its shape and weights."""
    lora_rank: int = bounded(0, 0)
    """Train low-rank factors of this rank beside frozen matrices (LoRA; with --init); 0: train every weight."""
    lora_alpha: float = bounded(16.0, above=0)
    """The factors' product is added times lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ("qkv", "out", "up", "down")
    """Linear layers, by their last name, that get such factors."""

    def resolve(self, vocab: int) -> GPTConfig:
        changes = {n: getattr(self, n) for n in SHAPE if getattr(self, n) is not None}
        if "width" in changes and "hidden" not in changes:
            changes["hidden"] = 0
        if self.rows and self.rows < vocab:
            raise InputError(f"--rows must be at least the tokenizer's vocabulary of {vocab}; it is {self.rows}")
        if self.shapes:
            for name in ("kv_heads", "hidden"):
                if name in changes and getattr(self, name) is not None:
                    raise InputError(f"{flag(name)} and --shapes exclude each other: --shapes has it of each layer")
            found, layers = parsed(self.shapes), self.layers or SIZES[self.size].layers
            if len(found) != layers:
                gives = "" if self.layers else f", which --size {self.size} gives"
                raise InputError(
                    f"--shapes is of {len(found)} layers and --layers is {layers}{gives}: they must be as many"
                )
            changes["shapes"] = found
        try:
            return named(self.size, self.style, vocab=self.rows or vocab, dropout=self.dropout, **changes)
        except ValueError as error:  # it names fields
            said = re.sub(r"\b(width|heads|kv_heads|head_size|shapes)\b", lambda found: flag(found[0]), str(error))
            some = [name for name in ("width", "heads", "kv_heads") if flag(name) in said and name not in changes]
            raise InputError(said + f" (--size {self.size} gives what is left out)" * bool(some)) from None

    def length(self) -> int:
        """The context, which no vocabulary changes."""
        return self.resolve(self.rows or 256).context

    def take_shape(self, shape: GPTConfig) -> None:
        """The shape of --init into the fields; InputError for a flag that says otherwise (a default says nothing)."""
        size, default = SIZES[self.size], ModelConfig()
        if self.size != default.size and (size.layers, size.width) != (shape.layers, shape.width):
            given = f"{shape.layers} layers of width {shape.width}"
            raise InputError(f"--size is {self.size}, but the model of --init {self.init} has {given}: leave it out")
        if self.rows not in (0, shape.vocab):
            raise InputError(
                f"--rows is {self.rows}, but the model of --init {self.init} has {shape.vocab}: leave it out"
            )
        told = told_shape(shape)
        if self.shapes and shapes_text(shape) != self.shapes:
            raise InputError(f"--shapes is {self.shapes}, but the model of --init {self.init} has others: leave it out")
        for name in SHAPE:
            mine, given = getattr(self, name), told.get(name, getattr(shape, name))
            free = name == "context" and shape.position == "rotary"
            if mine is not None and mine != given and not free:
                has = f"layers of {shapes_text(shape)}" if given is None else given
                raise InputError(f"{flag(name)} is {mine}, but the model of --init {self.init} has {has}: leave it out")
            if mine is None:
                setattr(self, name, given)
        self.shapes = shapes_text(shape)
        kinds = {"norm": shape.norm, "position": shape.position, "mlp": shape.mlp}
        styles = [name for name, style in STYLES.items() if kinds.items() <= style.items()]
        if not styles:
            raise InputError(f"--init {self.init}: a model of {kinds} is of no style that fastlm trains")
        if self.style != default.style and self.style not in styles:
            raise InputError(
                f"--style is {self.style}, but the model of --init {self.init} is of style {styles[0]}: leave it out"
            )
        self.style, self.rows = styles[0], shape.vocab  # type: ignore[assignment]


@dataclass
class DataConfig:
    """The data."""

    tokenizer: str = "bytes"
    """bytes, chars, bpe (trained on the corpus), or the path of a tokenizer.json."""
    vocab: int = bounded(8192, 1)
    """Tokens of a BPE trained on the corpus."""
    special_tokens: Literal["text", "read"] = "text"
    """text: what looks like a special token, such as <|endoftext|>, is text. read: it becomes that token."""
    field: str = "text"
    """Which field of rows (.jsonl, .json, .csv, .parquet) holds the text."""
    separator: str = ""
    """Text that parts documents within a file (\\n and \\t are understood)."""
    weights: tuple[float, ...] = bounded((), above=0)
    """Weights that mix several corpora (one per CORPUS); without them all are one."""
    val_fraction: float = bounded(0.05, above=0, below=1)
    """Part of the documents held out for validation, chosen by their content's hash."""
    fold: str = ""
    """Hold out this part of the documents in place of --val-fraction, such as 2/5; --folds 5 runs all five."""
    fraction: float = bounded(1.0, above=0, high=1)
    """Part of the other documents to train on; a larger one holds each smaller one. --fractions runs several."""
    val: tuple[str, ...] = ()
    """More validation sets, as NAME=PATH: each evaluation also gives val_NAME_loss. The split's own decides."""
    packing: Literal["blocks", "documents"] = "blocks"
    """blocks: contexts are cut anywhere. documents: contexts hold whole documents, attention crosses no border, as in --sft."""
    sft: bool = False
    """Fine-tune on rows: prompt and completion, or messages. Completions, or the assistant's answers, alone are trained on."""
    dpo: bool = False
    """Learn from pairs (prompt, chosen, rejected) by Direct Preference Optimization, against the model of --init."""
    chat_template: str = ""
    """How messages become text: plain, a Jinja file or a folder with one; without it as --init has it, else plain."""
    workers: int = bounded(0, 0, 4096)
    """Processes that prepare the corpus; 0: one per core when it is large."""

    @property
    def rows(self) -> str:
        """What rows are fine-tuned on, as `data.tuning` has it; "" for texts."""
        return "sft" if self.sft else "dpo" if self.dpo else ""

    def check(self) -> None:
        """Raise InputError, naming the flag, for a value that cannot be; no data are read."""
        check_fields(self)
        if self.fold:
            parse_fold(self.fold)
        named: set[str] = set()
        for given in self.val:
            name, _, path = given.partition("=")
            if not name.isidentifier() or not path or name in named:
                raise InputError(f"--val takes NAME=PATH, each name (letters, digits, _) once; it is {given!r}")
            named.add(name)


@dataclass
class OptimConfig:
    """Optimisation."""

    steps: int = bounded(2930, 1)
    """Optimizer steps of the whole run."""
    batch: int = bounded(8, 1)
    """Samples of one step, over all ranks and micro-batches."""
    micro: int = bounded(0, 0)
    """Samples of one forward on one rank; 0: all of the rank's share at once."""
    ramp: int = bounded(0, 0)
    """Steps over which the batch grows from an eighth to its full size."""
    optimizer: Literal["adamw", "lion", "muon"] = "adamw"
    """adamw, lion, or muon (for the blocks' matrices, adamw for the rest)."""
    lr: float = bounded(3e-3, above=0)
    """Peak learning rate (of Muon's matrices: muon_lr)."""
    muon_lr: float = bounded(0.02, above=0)
    """Peak learning rate of the matrices under Muon."""
    betas: tuple[float, float] = bounded((0.9, 0.95), 0, below=1)
    """Decay of the first and second moment."""
    weight_decay: float = bounded(0.1, 0)
    """Decoupled weight decay of matrices, the embeddings' among them; biases and norms have none."""
    clip: float = bounded(1.0, 0)
    """Largest norm of the whole gradient; 0: not clipped."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up; wsd stays and falls over the last `cooldown` of the steps."""
    warmup: int | None = optional(0)
    """Steps over which the learning rate rises from 0; without it 100, or a fifth of a run of fewer than 500."""
    cooldown: float = bounded(0.2, 0, 1)
    """Part of the steps over which wsd falls, as far as warm-up leaves them."""
    min_lr: float = bounded(0.05, 0, 1)
    """Where the schedule ends, as a part of the peak."""
    smoothing: float = bounded(0.0, 0, below=1)
    """Label smoothing of the training loss; with --dpo the part of the pairs taken to be the wrong way round, below 0.5."""
    z_loss: float = bounded(0.0, 0)
    """Weight of the squared log-partition in the training loss."""
    beta: float = bounded(0.1, above=0)
    """With --dpo: what differences to the reference weigh; the larger, the nearer the model stays to it."""
    per_token: bool = False
    """With --dpo: log-probabilities per token of an answer, so that its length counts nothing."""
    ema: float = bounded(0.0, 0, below=1)
    """Decay of an exponential moving average of the weights, used for evaluation; 0: none."""
    prune: str = ""
    """Prune the linear layers while training, by magnitude: to a part of zeros such as 0.7, or a pattern such as 2:4."""
    prune_method: Literal["gradual", "magnitude", "sr-ste"] = "gradual"
    """gradual: the zeros grow by a cubic schedule (Zhu and Gupta 2017). magnitude, and patterns: all at once, at the begin.
    sr-ste: a pattern's weights are chosen anew in each step, and those masked learn too (Zhou et al. 2021), to --prune-end."""
    prune_begin: float = bounded(0.2, 0, below=1)
    """Part of the steps before the first weights go."""
    prune_end: float = bounded(0.7, 0, 1)
    """Part of the steps after which no more go; what follows heals."""
    prune_every: int = bounded(20, 1)
    """Steps between two growths of the masks."""
    prune_decay: float = bounded(2e-4, 0)
    """With --prune-method sr-ste: this times a masked weight is added to its gradient, after clipping."""

    @property
    def grows(self) -> bool:
        """Whether --prune makes its zeros bit by bit. InputError where it asks for what cannot be."""
        return bool(self.prune) and sparsity.target(self.prune)[0] is not None and self.prune_method == "gradual"

    @property
    def chooses(self) -> bool:
        """Whether --prune's weights are chosen anew in each step (SR-STE), until the last choice is held."""
        return bool(self.prune) and self.prune_method == "sr-ste"

    @property
    def rise(self) -> int:
        """Steps of the warm-up."""
        return min(100, self.steps // 5) if self.warmup is None else self.warmup

    @property
    def fall(self) -> float:
        """Steps of wsd's cooldown, which begins after the warm-up."""
        return max(min(self.steps * self.cooldown, self.steps - self.rise), 0)

    @property
    def falls(self) -> bool:
        """Whether the rate of any step is below the peak after the warm-up."""
        return self.schedule != "constant" and (self.fall > 1 if self.schedule == "wsd" else self.rise + 1 < self.steps)


@dataclass
class RunConfig:
    """The run."""

    name: str = ""
    """Name of the run's folder; without it, date and time."""
    out: str = "runs"
    """Folder of runs. A run's folder is never overwritten."""
    kernels: Literal["fused", "torch"] = "fused"
    """fused: fastlm's kernels swapped in; torch: PyTorch's own."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast to this type; weights and optimizer stay float32."""
    seed: int = bounded(1, *SEED)
    """Seed of weights, order of the data and dropout."""
    threads: int = bounded(0, 0, 4096)
    """CPU threads; 0: as PyTorch chooses."""
    compile: bool = False
    """torch.compile the model."""
    deterministic: bool = False
    """Ask PyTorch for deterministic algorithms (needed for exact resume on a GPU)."""
    recompute: Literal["none", "half", "full"] = "none"
    """Activation checkpointing: compute every other (half) or every (full) block again in the backward."""
    mesh: str = ""
    """Processes by dimension: dp=2 (the model on each), fsdp=4 (parameters cut over four), tp=2 (matrices and positions
    cut over two), pp=2 (blocks cut into two stages), and products of them such as dp=2,fsdp=2; "": dp over all."""
    pp_stages: int = bounded(1, 1)
    """Stages of a pipeline (--mesh pp=N) on each rank: 1 for 1F1B; more for interleaved 1F1B, which idles less, sends more."""
    nproc: int = bounded(0, 0, 4096)
    """Processes to start on this machine; 0: as many as the mesh has, else one for each GPU, else one."""
    eval_every: int = bounded(500, 0)
    """Steps between evaluations; 0: only at the end."""
    eval_tokens: int = bounded(65536, 0)
    """Validation tokens of an evaluation on the way, spread evenly; 0: all. The last one always takes all."""
    patience: int = bounded(0, 0)
    """Evaluations without improvement after which training stops and the best weights are restored; 0: never."""
    min_delta: float = bounded(0.0, 0)
    """What counts as improvement, in nats."""
    save_every: int = bounded(1000, 0)
    """Steps between checkpoints; 0: only at the end."""
    keep: int = bounded(2, 1)
    """Latest checkpoints kept, besides the best."""
    keep_every: int = bounded(0, 0)
    """Also keep each checkpoint at a multiple of this many steps."""
    max_bad: int = bounded(10, 1)
    """Steps in a row with a non-finite loss or gradient (each is skipped) after which training stops."""
    spike: float = bounded(0.0, 0)
    """Roll back to the last checkpoint when the loss exceeds its running mean by this factor; 0: never."""
    sample: int = bounded(400, 0)
    """Tokens of text generated after the last evaluation, and a quarter of that after each earlier one; 0: none."""
    tensorboard: bool = False
    """Also write tensorboard events into the run's folder."""
    wandb: str = ""
    """Also log to this project of Weights & Biases (package wandb); WANDB_MODE=offline keeps it on this machine."""
    quiet: bool = False
    """No progress bar."""
    when: str = ""
    """A curve of carbon or price (CSV of time and value): train while it is low, pausing by checkpoints; needs --deadline."""
    deadline: str = ""
    """When a run with --when must be done: a span from its start on such as 24h, 90m or 2d, or a time."""
    watts: float = bounded(0.0, 0)
    """What one processor is stated to draw, for an estimate where there is no counter of energy; 0: as far as it is known."""
    pue: float = bounded(1.0, 1)
    """Power usage effectiveness: the data centre's energy as a multiple of the devices', for the report."""
    carbon: str = ""
    """Grams of CO2e a kWh, or a country's code of three letters (table of codecarbon), for the report."""


@dataclass
class Config:
    """Train a language model on text."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Raise InputError, naming the flag, for a value that cannot be."""
        for group in (self.model, self.data, self.optim, self.run):
            check_fields(group)
        self.data.check()
        self._check_pairs()
        r = self.run
        if r.carbon:
            try:
                carbon_intensity(r.carbon)
            except EnergyError as error:
                raise InputError(f"--carbon {error}") from None
        if r.when and not r.deadline:
            raise InputError("--when needs --deadline, such as 24h: by then the run is done, whatever the curve says")
        if r.spike and r.spike <= 1:
            raise InputError(f"--spike must be above 1, a multiple of the mean loss, or 0; it is {r.spike}")
        if r.patience and not r.eval_every:
            raise InputError("--patience needs evaluations on the way: --eval-every is 0")
        if self.optim.prune:
            sparsity.check(self.optim, self.model.lora_rank)
        if r.compile and r.recompute != "none":
            raise InputError(
                f"--compile and --recompute {r.recompute} exclude each other: torch.compile cannot trace the "
                f"context in which blocks are recomputed; leave one out"
            )
        if self.model.lora_rank and not self.model.init:
            raise InputError("--lora-rank needs a model to adapt: --init RUN or an exported folder")
        if self.model.lora_rank and not self.model.lora_targets:
            raise InputError("--lora-targets must name a linear layer at least; it is empty")
        if "/" in r.name or "\0" in r.name or r.name in (".", ".."):
            raise InputError(
                f"--name must be a plain name, without a slash or byte 0; it is {r.name!r} (--out names the folder of runs)"
            )

    def _check_pairs(self) -> None:
        d, o = self.data, self.optim
        if d.sft and d.dpo:
            raise InputError("--sft and --dpo exclude each other: they train on other rows, one after the other")
        if not d.dpo:
            return
        if not self.model.init:
            raise InputError("--dpo needs a model to start from, which is the reference too: --init RUN")
        if o.z_loss:
            raise InputError(f"--z-loss and --dpo exclude each other; it is {o.z_loss:g}")
        if o.smoothing >= 0.5:
            raise InputError(
                f"--smoothing with --dpo must be below 0.5, where a pair says nothing any more; it is {o.smoothing:g}"
            )

    def notes(self) -> list[str]:
        """What the configuration does that its flags alone would not make one expect, a sentence each."""
        o, out = self.optim, list[str]()
        if self.data.sft and not self.model.init:
            out.append("--sft without --init: the model that learns from the rows starts from random weights")
        if o.rise > o.steps:
            out.append(
                f"--warmup {o.rise} is longer than the run of {o.steps} steps: the learning rate ends at "
                f"{o.steps / o.rise:.0%} of its peak"
            )
        elif o.schedule == "wsd" and o.fall < o.steps * o.cooldown:
            out.append(
                f"--warmup {o.rise} and --cooldown {o.cooldown:g} take more than the {o.steps} steps: the cooldown has the "
                f"last {o.fall}"
            )
        return out + list(self._idle())

    def _idle(self) -> Iterator[str]:
        """A sentence for each flag that is given and that the others leave without effect."""
        m, d, o, r = self.model, self.data, self.optim, self.run
        for group, name, heeded, by in (
            (m, "rope_base", m.style == "llama" or bool(m.init), "--style llama"),
            (m, "lora_alpha", m.lora_rank > 0, "--lora-rank"),
            (m, "lora_targets", m.lora_rank > 0, "--lora-rank"),
            (d, "vocab", d.tokenizer == "bpe", "--tokenizer bpe"),
            (d, "val_fraction", not d.fold, "a split without --fold"),
            (d, "field", not d.rows or bool(d.val), "a corpus of texts, not --sft or --dpo"),
            (d, "separator", not d.rows or bool(d.val), "a corpus of texts, not --sft or --dpo"),
            (d, "chat_template", bool(d.rows), "--sft or --dpo"),
            (o, "beta", d.dpo, "--dpo"),
            (o, "per_token", d.dpo, "--dpo"),
            (o, "muon_lr", o.optimizer == "muon", "--optimizer muon"),
            (o, "cooldown", o.schedule == "wsd", "--schedule wsd"),
            (o, "schedule", o.rise < o.steps, "steps after the warm-up (--warmup)"),
            (o, "min_lr", o.falls, "a step whose rate falls (--schedule, --warmup, --cooldown)"),
            *((o, *rest) for rest in sparsity.heeded(o)),
            (r, "deadline", bool(r.when), "--when"),
            (r, "eval_tokens", 0 < r.eval_every < o.steps, "an evaluation before the last (--eval-every)"),
        ):
            if not heeded and getattr(group, name) != getattr(type(group)(), name):
                yield f"{flag(name)} is of no effect here: it needs {by}"
        saves = [every for every in (r.save_every, r.eval_every) if every]
        if r.keep_every and o.steps % r.keep_every and not any(math.lcm(e, r.keep_every) <= o.steps for e in saves):
            yield (
                f"--keep-every {r.keep_every} keeps no checkpoint of this run: of those that --save-every {r.save_every} "
                f"makes in {o.steps} steps, none is at a multiple of it"
            )
        if r.spike and not any(every < o.steps for every in saves):
            yield f"--spike {r.spike:g} finds no checkpoint of this run to go back to: none is saved before its last step"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Config:
        """From a saved configuration; fields that this version does not know are left out."""
        groups = {}
        for group in dataclasses.fields(cls):
            kind = group.default_factory  # type: ignore[misc]
            known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved[group.name].items() if k in known}
            groups[group.name] = kind(**values)  # type: ignore[operator,misc]
        return cls(**groups)

    def differences(self, other: Config) -> list[str]:
        """What changes from self to other, one line each."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [
            f"{name}: {value} -> {theirs[group][name]}"
            for group in mine
            for name, value in mine[group].items()
            if value != theirs[group][name]
        ]


assert set(SIZES) == set(Size.__args__)  # type: ignore[attr-defined]
assert set(STYLES) == {"gpt2", "llama"}
