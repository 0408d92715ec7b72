"""Configuration of a training run: documented dataclasses, from which the command line is made.

Field names are unique over all groups, since on the command line each is a flag of its own (`--lr 3e-3`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from fastlm.data.errors import InputError
from fastlm.models.gpt import SIZES, STYLES, GPTConfig, named

SHAPE = ("layers", "heads", "kv_heads", "width", "hidden", "context", "tied", "bias", "eps", "rope_base")
Size = Literal["nano", "small", "124M", "350M", "1B", "7B"]


@dataclass
class ModelConfig:
    """The model."""

    size: Size = "nano"
    """A named size; the fields below change what it says."""
    style: Literal["gpt2", "llama"] = "llama"
    """gpt2: LayerNorm, learned positions, GELU, biases. llama: RMSNorm, rotary positions, SwiGLU, no biases."""
    layers: int | None = None
    """Number of blocks."""
    heads: int | None = None
    """Query heads of each attention."""
    kv_heads: int | None = None
    """Key and value heads; fewer than heads groups the queries."""
    width: int | None = None
    """Width of the residual stream."""
    hidden: int | None = None
    """Width of the MLP."""
    context: int | None = None
    """Tokens that one sample holds."""
    dropout: float = 0.0
    """Probability of dropout on embeddings, attention and both branches of a block."""
    tied: bool | None = None
    """Whether the output matrix is the embedding's."""
    bias: bool | None = None
    """Whether the linear layers (and LayerNorm) have biases."""
    eps: float | None = None
    """What the norms add to the variance."""
    rope_base: float | None = None
    """Base of the rotary positions' wavelengths."""
    rows: int = 0
    """Rows of the embedding, at least the tokenizer's vocabulary; 0: as many."""
    init: str = ""
    """A run, checkpoint or exported folder (transformers' GPT-2 and Llama too) to start from: its shape, its weights."""
    lora_rank: int = 0
    """Train low-rank factors of this rank beside frozen matrices (LoRA; with --init); 0: train every weight."""
    lora_alpha: float = 16.0
    """The factors' product is added times lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ("qkv", "out", "up", "down")
    """Linear layers, by their last name, that get such factors."""

    def resolve(self, vocab: int) -> GPTConfig:
        changes = {n: getattr(self, n) for n in SHAPE if getattr(self, n) is not None}
        if "width" in changes and "hidden" not in changes:
            changes["hidden"] = 0
        if self.rows and self.rows < vocab:
            raise InputError(f"--rows must be at least the tokenizer's vocabulary of {vocab}; it is {self.rows}")
        try:
            return named(self.size, self.style, vocab=self.rows or vocab, dropout=self.dropout, **changes)
        except ValueError as error:
            raise InputError(str(error)) from None

    def length(self) -> int:
        """The context, which no vocabulary changes."""
        return self.resolve(self.rows or 256).context

    def take_shape(self, shape: GPTConfig) -> None:
        """The shape of --init into the fields; InputError for a flag that says otherwise."""
        for name in SHAPE:
            mine, given = getattr(self, name), getattr(shape, name)
            given = {"kv_heads": shape.kv_heads or shape.heads, "hidden": shape.mlp_width}.get(name, given)
            free = name == "context" and shape.position == "rotary"
            if mine is not None and mine != given and not free:
                raise InputError(
                    f"--{name.replace('_', '-')} is {mine}, but the model of --init {self.init} has {given}: leave it out"
                )
            if mine is None:
                setattr(self, name, given)
        kinds = {"norm": shape.norm, "position": shape.position, "mlp": shape.mlp}
        styles = [name for name, style in STYLES.items() if kinds.items() <= style.items()]
        if not styles:
            raise InputError(f"--init {self.init}: a model of {kinds} is of no style that fastlm trains")
        self.style, self.rows = styles[0], shape.vocab  # type: ignore[assignment]


@dataclass
class DataConfig:
    """The data."""

    tokenizer: str = "bytes"
    """bytes, chars, bpe (trained on the corpus), or the path of a tokenizer.json."""
    vocab: int = 8192
    """Tokens of a BPE trained on the corpus."""
    field: str = "text"
    """Which field of rows (.jsonl, .json, .csv, .parquet) holds the text."""
    separator: str = ""
    """Text that parts documents within a file (\\n and \\t are understood)."""
    weights: tuple[float, ...] = ()
    """Weights that mix several corpora (one per CORPUS); without them all are one."""
    val_fraction: float = 0.05
    """Part of the documents held out for validation, chosen by their content's hash."""
    val: tuple[str, ...] = ()
    """More validation sets, as NAME=PATH: each evaluation also gives val_NAME_loss. The split's own decides."""
    packing: Literal["blocks", "documents"] = "blocks"
    """blocks: contexts are cut anywhere. documents: contexts hold whole documents, attention crosses no border."""
    workers: int = 0
    """Processes that prepare the corpus; 0: one per core when it is large."""


@dataclass
class OptimConfig:
    """Optimisation."""

    steps: int = 2930
    """Optimizer steps of the whole run."""
    batch: int = 8
    """Samples of one step, over all ranks and micro-batches."""
    micro: int = 0
    """Samples of one forward on one rank; 0: all of the rank's share at once."""
    ramp: int = 0
    """Steps over which the batch grows from an eighth to its full size."""
    optimizer: Literal["adamw", "lion", "muon"] = "adamw"
    """adamw, lion, or muon (for the blocks' matrices, adamw for the rest)."""
    lr: float = 3e-3
    """Peak learning rate (of Muon's matrices: muon_lr)."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices under Muon."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices, the embeddings' among them; biases and norms have none."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0: not clipped."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up; wsd stays and falls over the last `cooldown` of the steps."""
    warmup: int = 100
    """Steps over which the learning rate rises from 0."""
    cooldown: float = 0.2
    """Part of the steps over which wsd falls."""
    min_lr: float = 0.05
    """Where the schedule ends, as a part of the peak."""
    smoothing: float = 0.0
    """Label smoothing of the training loss."""
    z_loss: float = 0.0
    """Weight of the squared log-partition in the training loss."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, used for evaluation; 0: none."""


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
    seed: int = 1
    """Seed of weights, order of the data and dropout."""
    threads: int = 0
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
    pp_stages: int = 1
    """Stages of a pipeline (--mesh pp=N) on each rank: 1 for 1F1B; more for interleaved 1F1B, which idles less, sends more."""
    nproc: int = 0
    """Processes to start on this machine; 0: as many as the mesh has, else one for each GPU, else one."""
    eval_every: int = 500
    """Steps between evaluations; 0: only at the end."""
    eval_tokens: int = 65536
    """Validation tokens of an evaluation on the way, spread evenly; 0: all. The last one always takes all."""
    patience: int = 0
    """Evaluations without improvement after which training stops and the best weights are restored; 0: never."""
    min_delta: float = 0.0
    """What counts as improvement, in nats."""
    save_every: int = 1000
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Latest checkpoints kept, besides the best."""
    keep_every: int = 0
    """Also keep each checkpoint at a multiple of this many steps."""
    max_bad: int = 10
    """Steps in a row with a non-finite loss or gradient (each is skipped) after which training stops."""
    spike: float = 0.0
    """Roll back to the last checkpoint when the loss exceeds its running mean by this factor; 0: never."""
    sample: int = 400
    """Tokens of text generated after the last evaluation, and a quarter of that after each earlier one; 0: none."""
    tensorboard: bool = False
    """Also write tensorboard events into the run's folder."""
    wandb: str = ""
    """Also log to this project of Weights & Biases (package wandb); WANDB_MODE=offline keeps it on this machine."""
    quiet: bool = False
    """No progress bar."""


@dataclass
class Config:
    """Train a language model on text."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self) -> None:
        """Raise InputError, naming the flag, for a value that cannot be."""
        o, r = self.optim, self.run
        for name, value, low in (
            ("steps", o.steps, 1),
            ("batch", o.batch, 1),
            ("micro", o.micro, 0),
            ("warmup", o.warmup, 0),
            ("ramp", o.ramp, 0),
            ("keep", r.keep, 1),
            ("nproc", r.nproc, 0),
            ("pp-stages", r.pp_stages, 1),
            ("eval-every", r.eval_every, 0),
            ("save-every", r.save_every, 0),
            ("max-bad", r.max_bad, 1),
            ("patience", r.patience, 0),
            ("eval-tokens", r.eval_tokens, 0),
            ("keep-every", r.keep_every, 0),
            ("threads", r.threads, 0),
            ("sample", r.sample, 0),
            ("rows", self.model.rows, 0),
            ("lora-rank", self.model.lora_rank, 0),
        ):
            if value < low:
                raise InputError(f"--{name} must be at least {low}; it is {value}")
        for name, part, top in (
            ("dropout", self.model.dropout, 1.0),
            ("val-fraction", self.data.val_fraction, 1.0),
            ("smoothing", o.smoothing, 1.0),
            ("ema", o.ema, 1.0),
        ):
            if not 0 <= part < top:
                raise InputError(f"--{name} must lie in [0, 1); it is {part}")
        if not 0 < o.lr < float("inf"):
            raise InputError(f"--lr must be positive and finite; it is {o.lr}")
        if not 0 < o.muon_lr < float("inf"):
            raise InputError(f"--muon-lr must be positive and finite; it is {o.muon_lr}")
        for name, beta in zip(("first", "second"), o.betas):
            if not 0 <= beta < 1:
                raise InputError(f"--betas must lie in [0, 1); the {name} is {beta}")
        for name, number in (
            ("weight-decay", o.weight_decay),
            ("clip", o.clip),
            ("z-loss", o.z_loss),
            ("min-lr", o.min_lr),
            ("min-delta", r.min_delta),
            ("spike", r.spike),
        ):
            if not 0 <= number < float("inf"):
                raise InputError(f"--{name} must be finite and not negative; it is {number}")
        if r.spike and r.spike <= 1:
            raise InputError(f"--spike must be above 1, a multiple of the mean loss, or 0; it is {r.spike}")
        if not 0 <= o.cooldown <= 1:
            raise InputError(f"--cooldown must lie in [0, 1]; it is {o.cooldown}")
        if r.patience and not r.eval_every:
            raise InputError("--patience needs evaluations on the way: --eval-every is 0")
        for name in ("layers", "heads", "kv_heads", "width", "hidden", "context"):
            size = getattr(self.model, name)
            if size is not None and size < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1; it is {size}")
        if self.model.lora_rank and not self.model.init:
            raise InputError("--lora-rank needs a model to adapt: --init RUN or an exported folder")
        if "/" in r.name or r.name in (".", ".."):
            raise InputError(
                f"--name must be a plain name, without a slash; it is {r.name!r} (--out names the folder of runs)"
            )

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
