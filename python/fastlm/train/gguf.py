"""`fastlm export --to gguf`: a model as one file for llama.cpp, matrices in q8_0 (32 values share a 16-bit scale).

Queries and keys of Llama are turned from halves to pairs, since llama.cpp rotates neighbours. The file is written by the
package gguf (extra `export`). Matrices whose rows are no multiple of 32 values stay in float16, and are named.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlm.console import warn
from fastlm.data import InputError
from fastlm.data import tokenizer as tokenizers
from fastlm.train import export
from fastlm.train.files import sync_folder

TOP = {"embed": "token_embd", "place": "position_embd", "norm": "output_norm", "head": "output"}
BLOCK: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": {
        "norm1": ("attn_norm",),
        "attn.qkv": ("attn_q", "attn_k", "attn_v"),
        "attn.out": ("attn_output",),
        "norm2": ("ffn_norm",),
        "mlp.up": ("ffn_gate", "ffn_up"),
        "mlp.down": ("ffn_down",),
    },
    "gpt2": {
        "norm1": ("attn_norm",),
        "attn.qkv": ("attn_qkv",),
        "attn.out": ("attn_output",),
        "norm2": ("ffn_norm",),
        "mlp.up": ("ffn_up",),
        "mlp.down": ("ffn_down",),
    },
}
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}


def names(source: export.Source) -> dict[str, Tensor]:
    """The model's tensors under llama.cpp's names."""
    c, style = source.shape, export.style_of(source.shape)
    heads, kv = c.heads, c.kv_heads or c.heads
    out: dict[str, Tensor] = {}
    for ours, t in source.tensors.items():
        path, _, kind = ours.rpartition(".")
        if path in TOP:
            out[f"{TOP[path]}.{kind}"] = t
            continue
        _, i, part = path.split(".", 2)
        theirs, cut = BLOCK[style][part], export._pieces(c, part) if style == "llama" else []
        for name, piece in zip(theirs, t.split(cut) if cut else (t,)):
            if name in ("attn_q", "attn_k"):
                piece = paired(piece, heads if name == "attn_q" else kv)
            out[f"blk.{i}.{name}.{kind}"] = piece
    return out


def paired(t: Tensor, heads: int) -> Tensor:
    """Rows of each head from (x1 ... , x2 ...) to (x1, x2, x1, x2, ...)."""
    size = t.shape[0] // heads
    return t.reshape(heads, 2, size // 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)


def write(source: export.Source, folder: Path, dtype: str = "q8_0", chat_template: str = "") -> list[str]:
    """Write FOLDER/model.gguf, whole or not at all; returns the names of its files. `chat_template` is in Jinja.

    Raises InputError where the package gguf is missing, the folder exists, or llama.cpp has no such model.
    """
    try:
        import gguf
    except ImportError:
        raise InputError("--to gguf needs the package gguf: pip install -c constraints.txt gguf") from None
    if folder.exists():
        raise InputError(f"{folder} exists and is not overwritten: choose another --folder, or remove it")
    style = export.style_of(source.shape)
    draft = folder.parent / f".draft-{folder.name}-{os.getpid()}"
    wanted = getattr(gguf.GGMLQuantizationType, TYPES[dtype])
    try:
        draft.mkdir(parents=True)
        writer = gguf.GGUFWriter(str(draft / "model.gguf"), style)
        _facts(writer, source, style, gguf.LlamaFileType[f"MOSTLY_{TYPES[dtype]}" if dtype != "float32" else "ALL_F32"])
        _vocabulary(writer, source, gguf.TokenType)
        if chat_template:
            writer.add_chat_template(chat_template)
        odd = []
        for name, t in names(source).items():
            array, kind = t.float().contiguous().numpy(), gguf.GGMLQuantizationType.F32
            if array.ndim > 1:
                kind = wanted
                if dtype == "q8_0" and array.shape[-1] % 32:
                    odd.append(name)
                    kind = gguf.GGMLQuantizationType.F16
                array = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.rename(draft, folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if odd:
        warn(f"{len(odd)} matrices stay in float16, such as {odd[0]}: their rows are no multiple of 32 values")
    return sorted(p.name for p in folder.iterdir())


def _facts(writer: Any, source: export.Source, style: str, kind: Any) -> None:
    c = source.shape
    writer.add_file_type(kind)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.mlp_width)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads or c.heads)
    if style == "llama":
        writer.add_layer_norm_rms_eps(c.eps)
        writer.add_rope_freq_base(c.rope_base)
        writer.add_rope_dimension_count(c.size)
        if c.head_size:
            writer.add_key_length(c.size)
            writer.add_value_length(c.size)
        writer.add_vocab_size(c.vocab)
    else:
        writer.add_layer_norm_eps(c.eps)


def _vocabulary(writer: Any, source: export.Source, kinds: Any) -> None:
    """Bytes and byte-level BPE as llama.cpp's "gpt2" vocabulary; others, which it cannot be, are left out and said."""
    spec = source.tokenizer
    model = None if spec is None else json.loads(export.tokenizer_json(spec))
    if model is None or spec is None or spec["kind"] == "chars" or model["model"].get("type", "BPE") != "BPE":
        writer.add_tokenizer_model("none")
        warn("the file holds no tokenizer: llama.cpp has none like this model's, so give it token numbers")
        return
    vocab = dict(model["model"]["vocab"])
    added = {t["content"]: t["id"] for t in model["added_tokens"]}
    by_id = {i: token for token, i in (vocab | added).items()}
    tokens = [by_id.get(i, f"<|unused {i}|>") for i in range(source.shape.vocab)]
    types = [kinds.CONTROL if token in added else kinds.NORMAL if i in by_id else kinds.UNUSED
             for i, token in enumerate(tokens)]  # fmt: skip
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["model"]["merges"]]
    end = tokenizers.load(spec).eot
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)
