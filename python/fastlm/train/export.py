"""Models out and in: a run, a checkpoint or an exported folder becomes named tensors, and those become safetensors or
what `transformers` loads.

    fastlm's own:  config.json {model, tokenizer}        model.safetensors (the plain GPT's names)   tokenizer.json
    transformers': config.json (GPT-2, Llama, Mistral)   model.safetensors (their names)             tokenizer.json

GPT-2 keeps its matrices transposed (Conv1D); Llama keeps queries, keys, values and gate, up apart where the plain GPT
has one matrix. Weights are read from safetensors alone, never by pickle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm import compress
from fastlm.compress import Held
from fastlm.console import warn
from fastlm.data import InputError
from fastlm.data import tokenizer as tokenizers
from fastlm.data.bounds import COUNT
from fastlm.models.gpt import GPTConfig
from fastlm.train import checkpoint, compressed_tensors, lora, pruning
from fastlm.train.checkpoint import CheckpointError
from fastlm.train.config import Config, OptimConfig
from fastlm.train.files import sync_folder, write_text

END = "<|endoftext|>"
# in transformers' config.json: how the run's tokenizer read text, where that is not `text`
SPECIAL = "fastlm_special_tokens"
ATTEMPTS = 20  # at a checkpoint of a run that is training
TOP = {
    "gpt2": {
        "embed": "transformer.wte",
        "place": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    "llama": {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
}
BLOCK: dict[str, dict[str, tuple[str, ...]]] = {  # what one matrix here is there, cut along its rows
    "gpt2": {
        "norm1": ("ln_1",),
        "attn.qkv": ("attn.c_attn",),
        "attn.out": ("attn.c_proj",),
        "norm2": ("ln_2",),
        "mlp.up": ("mlp.c_fc",),
        "mlp.down": ("mlp.c_proj",),
    },
    "llama": {
        "norm1": ("input_layernorm",),
        "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.out": ("self_attn.o_proj",),
        "norm2": ("post_attention_layernorm",),
        "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": ("mlp.down_proj",),
    },
}
NO_WEIGHTS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # constants that older files hold
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}


@dataclass(frozen=True)
class Source:
    """A model read from somewhere: its shape, its plain tensors in float32, and its tokenizer where that is known.

    Of a model whose layers are int8 `tensors` has the dequantised values, and `int8` the integers. `masks` are a pruned
    model's, by the keys of `compress.masks`."""

    shape: GPTConfig
    tensors: dict[str, Tensor]
    tokenizer: dict[str, Any] | None
    int8: Held | None = None
    masks: dict[str, Tensor] = dataclasses.field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------------------- in


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
        return found
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def described(path: Path) -> tuple[Path, dict[str, Any], GPTConfig]:
    """The folder whose config.json tells of the model in `path`, that file, and the shape in it; as `read_model` raises."""
    run = path.parent.parent if (path / "state.json").is_file() else path
    config = _json(run / "config.json") if (run / "config.json").is_file() else {}
    if "quantization_config" in config:
        raise InputError(f"{path} holds quantized weights; fastlm reads float ones, or what `fastlm compress` wrote")
    if "model_type" in config:
        return run, config, _hf_shape(config, path)
    if "model" not in config:
        raise InputError(f"{path} is no run, checkpoint or exported folder: it holds no config.json of a model")
    try:
        return run, config, GPTConfig(**config["model"])
    except (TypeError, ValueError) as error:
        raise InputError(f"{run / 'config.json'} cannot be read: {error}") from None


def read_model(path: Path, floats: bool = True) -> Source:
    """The model of a run (its best weights, else its last), a checkpoint, or an exported folder of either kind.

    An average of the weights (--ema) comes in the weights' place, and LoRA's adapters are merged into their matrices. Without
    `floats` int8 layers stay as they are: weights int8 and scales beside them, as `base.build` takes them.
    Raises InputError, in one sentence, for a folder that is none of these or a model that the plain GPT cannot be.
    """
    run, config, shape = described(path)
    if "model_type" in config:
        tensors = {name: t.float() for name, t in _files(path).items()}
        try:
            tokenizer = read_tokenizer(path)
        except InputError:  # a model serves without; who needs its tokenizer asks for it and gets the reason
            tokenizer = None
        return Source(*from_hf(config, tensors, path), tokenizer)
    int8 = None
    if run == path and (config.get("compressed") or config.get("soup")):
        tensors, int8 = _compressed(run, config.get("compressed", {}), floats)
    elif run == path and checkpoint.steps(run):
        tensors = _chosen(run, config)
    else:
        tensors = _files(path) if run == path else checkpoint_tensors(path)
    if (run / lora.BASE).is_dir():
        tensors = {**base_tensors(run)[0], **tensors}
        settings = config["config"]["model"]
        tensors = lora.merged(tensors, settings["lora_alpha"] / settings["lora_rank"])
    tensors, masks = compress.split(tensors)
    return Source(shape, compress.floats(tensors, masks), config.get("tokenizer"), int8, masks)


def _compressed(run: Path, record: Any, floats: bool) -> tuple[dict[str, Tensor], Held | None]:
    """The tensors of a folder that `fastlm compress` or `soup` wrote, or of LoRA's base, and its int8 layers."""
    checkpoint.verify(run)
    tensors = checkpoint.read_safetensors(run / "model.safetensors")
    try:
        facts = record.get("int8")
        int8 = Held.of(tensors, facts) if facts else None
    except (AttributeError, ValueError) as error:
        raise InputError(f"{run} cannot be read: {error}") from None
    return (int8.floats(tensors) if int8 is not None and floats else tensors), int8


def base_tensors(run: Path, floats: bool = True) -> tuple[dict[str, Tensor], Held | None]:
    """The tensors of the frozen base beside a run's adapters, and its int8 layers where it has some; as of `read_model`."""
    facts = run / lora.BASE / lora.INT8
    return _compressed(run / lora.BASE, {"int8": _json(facts)} if facts.is_file() else {}, floats)


def _chosen(run: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a run's best checkpoint, else its last; of a run that prunes, none from before its last growth counts.

    A run that trains meanwhile may remove the one that is read.
    """
    optim = Config.from_dict(config["config"]).optim if "config" in config else OptimConfig()
    for _ in range(ATTEMPTS):
        best = [found for found in checkpoint.steps(run, "best") if pruning.settled(optim, found[0])]
        own = best[-1][1] if best else checkpoint.newest(run, warn)
        try:
            return checkpoint_tensors(own)
        except CheckpointError:
            if own.exists():
                raise
    raise CheckpointError(f"the checkpoints of {run} are replaced faster than they can be read: try again")


def read_tokenizer(path: Path) -> dict[str, Any] | None:
    """The tokenizer's specification of a run, checkpoint or exported folder; None where it does not tell.

    Raises InputError for tokenizer files of transformers that cannot be read here.
    """
    run = path.parent.parent if (path / "state.json").is_file() else path
    config = _json(run / "config.json") if (run / "config.json").is_file() else {}
    spec: dict[str, Any] | None = config.get("tokenizer") or config.get("fastlm_tokenizer")
    content = run / "tokenizer.json"
    if spec is None and "model_type" in config and content.is_file():
        how = {"special_tokens": config[SPECIAL]} if SPECIAL in config else {}
        return {"kind": "bpe", "content": content.read_text(encoding="utf-8"), **how}
    return _older_tokenizer(run) if spec is None and "model_type" in config else spec


def _older_tokenizer(folder: Path) -> dict[str, Any] | None:
    """What transformers makes of a sentencepiece or GPT-2 tokenizer that has no tokenizer.json; None where there is none."""
    files = [n for n in ("tokenizer.model", "vocab.json", "merges.txt") if (folder / n).is_file()]
    if "tokenizer.model" not in files and files != ["vocab.json", "merges.txt"]:
        return None
    what = f"{folder} holds {' and '.join(files)} and no tokenizer.json"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise InputError(
            f"{what}: reading that tokenizer needs the package transformers: pip install transformers"
        ) from None
    try:
        made = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, use_fast=True)
        content = str(made.backend_tokenizer.to_str())
        found = tokenizers.BPETokenizer(content)
        if "vocab.json" in files and (lost := set(_json(folder / "vocab.json").values()) - set(range(found.vocab))):
            raise ValueError(f"{len(lost)} of the tokens of vocab.json are lost")
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(
            f"{what}, and transformers cannot read that tokenizer ({type(error).__name__}: {said})"
        ) from error
    return {"kind": "bpe", "content": content}


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint, averaged ones where it has them."""
    checkpoint.verify(folder)
    tensors = checkpoint.Stored(folder, "model").load()
    if checkpoint.holds(folder, "ema"):
        tensors.update(checkpoint.Stored(folder, "ema").load())
    return tensors


def _files(path: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the shards that its index names."""
    index = path / "model.safetensors.index.json"
    names = sorted(set(_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (path / name).is_file():
            pickled = " (pickled weights are never read)" if list(path.glob("*.bin")) else ""
            raise InputError(f"{path} holds no {name}{pickled}")
        try:
            tensors.update(checkpoint.read_safetensors(path / name))
        except Exception as error:  # noqa: BLE001 (safetensors has one error class of its own for every damage)
            raise InputError(f"{path / name} cannot be read: {error}") from None
    return tensors


def _pieces(shape: GPTConfig, ours: str) -> list[int]:
    """Rows of the parts of one of our matrices, in Llama's order."""
    kv = (shape.kv_heads or shape.heads) * shape.size
    return {"attn.qkv": [shape.heads * shape.size, kv, kv], "mlp.up": [shape.mlp_width] * 2}.get(ours, [])


def _names(shape: GPTConfig, style: str) -> list[tuple[str, tuple[str, ...], list[int], bool]]:
    """(our name, theirs, rows of each part, transposed there) of every tensor."""
    out: list[tuple[str, tuple[str, ...], list[int], bool]] = []
    for ours, theirs in TOP[style].items():
        if ours == "head" and shape.tied:
            continue
        kinds = ("weight", "bias") if ours == "norm" and style == "gpt2" else ("weight",)
        out += [(f"{ours}.{kind}", (f"{theirs}.{kind}",), [], False) for kind in kinds]
    for i in range(shape.layers):
        for ours, parts in BLOCK[style].items():
            norm = ours.startswith("norm")
            for kind in ("weight", "bias") if shape.bias and not (norm and style == "llama") else ("weight",):
                theirs_all = tuple(f"{BLOCKS[style]}.{i}.{part}.{kind}" for part in parts)
                cut = _pieces(shape, ours) if style == "llama" else []
                out.append((f"blocks.{i}.{ours}.{kind}", theirs_all, cut, style == "gpt2" and not norm))
    return out


def from_hf(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The plain GPT's shape and tensors from those of GPT2LMHeadModel or LlamaForCausalLM."""
    shape, style = _hf_shape(config, path), {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    if style == "gpt2":  # older files leave the prefix out
        tensors = {
            n if n.startswith(("transformer.", "lm_head.")) else f"transformer.{n}": t for n, t in tensors.items()
        }
    out: dict[str, Tensor] = {}
    left = {name for name in tensors if not name.endswith(NO_WEIGHTS) and not (shape.tied and name == "lm_head.weight")}
    for ours, theirs, _, transposed in _names(shape, style):
        left.difference_update(theirs)
        missing = [name for name in theirs if name not in tensors]
        if missing:
            raise InputError(f"{path} lacks the tensor {missing[0]} that its config.json promises")
        whole = torch.cat([tensors[name] for name in theirs]) if len(theirs) > 1 else tensors[theirs[0]]
        out[ours] = (whole.t() if transposed and whole.ndim == 2 else whole).contiguous()
    if left:
        raise InputError(
            f"{path} holds {len(left)} tensors that its config.json does not promise, such as {min(left)}: the one does not "
            f"belong to the other"
        )
    return shape, out


def _hf_shape(config: Mapping[str, Any], path: Path) -> GPTConfig:
    """The shape that transformers' config.json tells; InputError, naming the field, where it does not."""
    if config["model_type"] not in (*BLOCK, "mistral"):
        raise InputError(f"{path} is a {config['model_type']} model; fastlm reads gpt2, llama and mistral")
    try:
        return (_gpt2_shape if config["model_type"] == "gpt2" else _llama_shape)(config, path)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(
            f"{path / 'config.json'} lacks the field {error.args[0]!r} of a {config['model_type']} model"
        ) from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise InputError(f"{path / 'config.json'} tells no shape of a {config['model_type']} model: {error}") from None


def _need(config: Mapping[str, Any], path: Path, **allowed: tuple[Any, ...]) -> None:
    for name, values in allowed.items():
        if config.get(name, values[0]) not in values:
            raise InputError(f"{path}: {name} is {config[name]!r}; fastlm's GPT needs {values[0]!r}")


def _gpt2_shape(c: Mapping[str, Any], path: Path) -> GPTConfig:
    _need(
        c,
        path,
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )
    return GPTConfig(
        layers=c["n_layer"],
        heads=c["n_head"],
        width=c["n_embd"],
        context=c["n_positions"],
        vocab=c["vocab_size"],
        hidden=c.get("n_inner") or 4 * c["n_embd"],
        tied=c.get("tie_word_embeddings", True),
        eps=c.get("layer_norm_epsilon", 1e-5),
    )


def _llama_shape(c: Mapping[str, Any], path: Path) -> GPTConfig:
    _need(c, path, hidden_act=("silu",))
    if c["model_type"] == "mistral" and (c.get("sliding_window") or COUNT) < c["max_position_embeddings"]:
        raise InputError(f"{path}: its attention sees {c['sliding_window']} positions back; fastlm's GPT sees all")
    heads, width = c["num_attention_heads"], c["hidden_size"]
    rope = c.get("rope_parameters") or {"rope_theta": c.get("rope_theta", 10000.0), **(c.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"{path}: its rotary positions are scaled ({kind}); fastlm's GPT has plain ones alone")
    if c.get("attention_bias", False) != c.get("mlp_bias", False):
        raise InputError(f"{path}: attention_bias and mlp_bias differ; fastlm's GPT has biases everywhere or nowhere")
    return GPTConfig(
        layers=c["num_hidden_layers"],
        heads=heads,
        width=width,
        context=c["max_position_embeddings"],
        vocab=c["vocab_size"],
        kv_heads=c.get("num_key_value_heads") or heads,
        hidden=c["intermediate_size"],
        norm="rms",
        position="rotary",
        mlp="swiglu",
        bias=c.get("attention_bias", False),
        tied=c.get("tie_word_embeddings", False),
        eps=c.get("rms_norm_eps", 1e-6),
        rope_base=float(rope["rope_theta"]),
        head_size=c.get("head_dim") or 0,
    )


# ------------------------------------------------------------------------------------------------------------------- out


def style_of(shape: GPTConfig) -> str:
    """gpt2 or llama; InputError names what neither class has."""
    kinds = (shape.norm, shape.position, shape.mlp)
    if shape.shapes:
        raise InputError(
            "transformers and llama.cpp take layers of one shape, and this model's differ (--per-layer); use --to safetensors"
        )
    if kinds == ("rms", "rotary", "swiglu"):
        return "llama"
    if kinds != ("layer", "learned", "gelu"):
        raise InputError(f"transformers has no class for norm, position and mlp of {kinds}; use --to safetensors")
    if (shape.kv_heads or shape.heads) != shape.heads:
        raise InputError(
            f"GPT2LMHeadModel has no grouped heads (kv_heads {shape.kv_heads} of {shape.heads}); use --to safetensors"
        )
    if not shape.bias:
        raise InputError("GPT2LMHeadModel has biases and this model has none; use --to safetensors")
    if shape.head_size:
        raise InputError(
            f"GPT2LMHeadModel has heads of width / heads alone, and this model has {shape.heads} of {shape.size} at a width of "
            f"{shape.width}; use --to safetensors"
        )
    return "gpt2"


def _llama_class(c: GPTConfig) -> dict[str, Any]:
    """Of config.json what tells LlamaForCausalLM from MistralForCausalLM: the same model, but without biases, and with any
    number of heads, where Llama's must divide the width."""
    if c.width % c.heads == 0:
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": c.bias,
            "mlp_bias": c.bias,
        }
    if c.bias:
        raise InputError(
            f"transformers has no class for {c.heads} heads at a width of {c.width}, which they do not divide, with biases; "
            f"use --to safetensors"
        )
    return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


def to_hf(source: Source) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors for GPT2LMHeadModel, LlamaForCausalLM or MistralForCausalLM."""
    c, style = source.shape, style_of(source.shape)
    out: dict[str, Tensor] = {}
    for ours, theirs, cut, transposed in _names(c, style):
        whole = source.tensors[ours]
        parts = whole.split(cut) if cut else (whole,)
        out.update({name: part.t() if transposed and part.ndim == 2 else part for name, part in zip(theirs, parts)})
    end = tokenizers.load(source.tokenizer).eot if source.tokenizer else None
    both = {
        "vocab_size": c.vocab,
        "tie_word_embeddings": c.tied,
        "dtype": "float32",
        "bos_token_id": end,
        "eos_token_id": end,
    }
    if source.tokenizer and source.tokenizer["kind"] != "bpe":
        both["fastlm_tokenizer"] = source.tokenizer
    elif source.tokenizer and "special_tokens" in source.tokenizer:
        both[SPECIAL] = source.tokenizer["special_tokens"]
    if style == "gpt2":
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": c.layers,
            "n_head": c.heads,
            "n_embd": c.width,
            "n_positions": c.context,
            "n_inner": c.mlp_width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": c.eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout),
            **both,
        }, out
    return {
        **_llama_class(c),
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads or c.heads,
        "hidden_size": c.width,
        "head_dim": c.size,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.context,
        "hidden_act": "silu",
        "rms_norm_eps": c.eps,
        "rope_theta": c.rope_base,  # transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},  # transformers 5
        **both,
    }, out


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level tokenizer.json (Radford et al. 2019)."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(b if b in plain else next(rest)) for b in range(256)]


def tokenizer_json(spec: Mapping[str, Any]) -> str:
    """The tokenizer as a tokenizer.json: bytes and characters are a BPE without merges. Token numbers stay."""
    if spec["kind"] == "bpe":
        return str(spec["content"])
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model: dict[str, Any] = {"type": "BPE", "merges": [], "ignore_merges": False, "byte_fallback": False}
    model |= {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False}
    added = []
    if spec["kind"] == "bytes":
        model |= {"unk_token": None, "vocab": {letter: i for i, letter in enumerate(byte_letters())}}
        outer: dict[str, Any] = {"pre_tokenizer": level, "decoder": level}
    else:
        known = [END, "<|unknown|>", *spec["characters"]]
        model |= {"unk_token": known[1], "vocab": {letter: i for i, letter in enumerate(known)}}
        outer = {"pre_tokenizer": None, "decoder": {"type": "Fuse"}}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [{"id": i, "content": known[i], "special": True, **flags} for i in (0, 1)]
    body = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    return json.dumps({**body, **outer, "post_processor": None, "model": model}, ensure_ascii=False)


def export(
    source: Source, to: str, folder: Path, dtype: str = "float32", more: Mapping[str, Any] | None = None
) -> list[str]:
    """Write the model into a new folder, whole or not at all; returns the names of its files. `more` has further ones by their
    names: a text, or a dict that is added to the JSON that is there.

    Raises InputError for a folder that exists, a disk that cannot take it, or a model that --to hf has no class for.
    """
    if folder.exists():
        raise InputError(f"{folder} exists and is not overwritten: choose another --folder, or remove it")
    texts: dict[str, Any] = {}
    if to == "hf":
        config, tensors = to_hf(source)
        if source.int8 is not None:
            style = style_of(source.shape)
            if why := compressed_tensors.why_not(style, source.int8):
                warn(f"the int8 layers are written as floats: {why}")
            else:
                compressed_tensors.overlay(source.int8, _names(source.shape, style), config, tensors)
        texts["config.json"] = config | {"dtype": dtype}
        texts["generation_config.json"] = {k: config[k] for k in ("bos_token_id", "eos_token_id")}
    else:
        tensors = dict(source.tensors)
        texts["config.json"] = {"model": dataclasses.asdict(source.shape), "tokenizer": source.tokenizer}
    if source.tokenizer:
        texts["tokenizer.json"] = tokenizer_json(source.tokenizer)
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings["model_max_length"] = source.shape.context
        if f'"{END}"' in texts["tokenizer.json"]:
            settings |= {"eos_token": END, "bos_token": END}
        texts["tokenizer_config.json"] = settings | {"clean_up_tokenization_spaces": False}
    texts |= {n: {**texts.get(n, {}), **c} if isinstance(c, dict) else c for n, c in (more or {}).items()}
    kind = getattr(torch, dtype)
    plain = lambda name, t: t.to(kind) if t.is_floating_point() and not name.endswith("weight_scale") else t
    tensors = {name: plain(name, t).contiguous() for name, t in tensors.items()}
    draft = folder.parent / f".draft-{folder.name}-{os.getpid()}"
    try:
        draft.mkdir(parents=True)
        with open(draft / "model.safetensors", "wb") as file:
            checkpoint.write_safetensors(file, tensors, {"format": "pt"})
            file.flush()
            os.fsync(file.fileno())
        for name, content in texts.items():
            write_text(draft / name, content if isinstance(content, str) else json.dumps(content, indent=2) + "\n")
        os.rename(draft, folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return sorted(p.name for p in folder.iterdir())
