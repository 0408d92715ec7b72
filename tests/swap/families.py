"""Every family of transformers that a tiny configuration can make: what swap promises of it, and what its modules then do.

python tests/swap/families.py --write docs/transformers.md      # all families, about fifteen minutes
python tests/swap/families.py llama bert                        # some of them, printed
"""

from __future__ import annotations

import argparse
import copy
import inspect
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import fastlm
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import configuration_auto, modeling_auto

PAGE = Path(__file__).parents[2] / "docs/transformers.md"
LENGTH, VOCABULARY = 12, 64
KINDS = {  # what a family is made as: the first that it has
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "base": modeling_auto.MODEL_MAPPING_NAMES,
}
# Fields by the end of their names, so that every family's spelling of a width or a depth is met.
TINY = [
    (r"vocab_size.*|.*_vocab_size", VOCABULARY),
    (r"(num_|n_|.*_)?(hidden_layers|layers|layer|blocks)|depth|num_.*_layers", 2),
    (r"num_key_value_heads|num_kv_heads|n_head_kv|num_.*_key_value_heads", 2),
    (r".*(attention_heads|_heads|n_head|n_heads|num_head)", 4),
    (r"hidden_size|d_model|n_embd|dim|embed_dim|embedding_size|d_embed|projection_dim|.*_hidden_size|.*_embed_dim", 32),
    (r"intermediate_size|ffn_dim|n_inner|d_ff|.*_ffn_dim|.*_intermediate_size|hidden_dim|ffn_hidden_size", 64),
    (r"head_dim|d_kv|kv_channels|attention_head_dim", 8),
    (r"(max_|n_)(.*position.*|ctx|positions|seq_len|sequence_length)", 64),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|num_selected_experts", 2),
    (r"q_lora_rank|kv_lora_rank", 8),
    (r"qk_nope_head_dim|qk_rope_head_dim", 8),
    (r"v_head_dim", 16),
    (r"image_size", 32),
    (r"patch_size", 8),
]
_SPECIAL = re.compile(r"(pad|bos|eos|sep|cls|mask|unk|decoder_start|.*)_?token_(id|index)")


class Family(NamedTuple):
    """One family: ``served`` of ``attentions``, ``norms`` and ``fused`` blocks that ran, and the ``reasons`` of the rest."""

    name: str
    kind: str
    attentions: int
    served: int
    norms: int
    fused: int
    reasons: tuple[tuple[str, int], ...]
    broken: str  # a promise that did not hold, or ""


class NotMade(Exception):
    """No tiny model of this family, or no forward of it on tokens."""


def names() -> list[str]:
    """The families that transformers has a model of."""
    known = {name for kind in KINDS.values() for name in kind}
    return sorted(known & set(configuration_auto.CONFIG_MAPPING_NAMES))


def shrink(config: Any) -> Any:
    """``config`` with widths, depths and vocabularies made small, in its parts too."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value)
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif _SPECIAL.fullmatch(name):
            setattr(config, name, min(value, 3))
        else:
            small = next((size for pattern, size in TINY if re.fullmatch(pattern, name)), None)
            if small is not None and value > small:
                setattr(config, name, small)
    return _consistent(config)


def _consistent(config: Any) -> Any:
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and name in ("layer_types", "mlp_layer_types", "block_types", "attention_types"):
            setattr(config, name, value[:layers] if layers else value)
    return config


def make(name: str, implementation: str | None = None) -> tuple[nn.Module, str]:
    """A tiny model of family ``name`` in evaluation, and which kind. Raises NotMade."""
    kind = next(kind for kind, mapping in KINDS.items() if name in mapping)
    found = KINDS[kind][name]
    try:
        cls = getattr(transformers, found if isinstance(found, str) else found[0])
        config = shrink(configuration_auto.CONFIG_MAPPING[name]())
        if implementation is not None:
            config._attn_implementation = implementation
        torch.manual_seed(0)
        return cls._from_config(config).eval(), kind
    except Exception as error:
        raise NotMade(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]) from error


def run(model: nn.Module, kind: str) -> Tensor:
    """The first floating tensor that ``model`` gives for random tokens. Raises NotMade."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, VOCABULARY, (2, LENGTH), generator=generator)
    takes = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"input_ids": tokens} if "input_ids" in takes else {}
    if kind == "seq2seq" or (kind == "base" and "decoder_input_ids" in takes):
        given["decoder_input_ids"] = tokens[:, :7]
    if not given and "pixel_values" in takes:
        size = getattr(model.config, "image_size", 32)
        shape = size if isinstance(size, (list, tuple)) else (size, size)
        given["pixel_values"] = torch.randn(2, getattr(model.config, "num_channels", 3), *shape, generator=generator)
    if "use_cache" in takes or hasattr(model.config, "use_cache"):
        given["use_cache"] = False
    if not given.keys() - {"use_cache"}:
        raise NotMade("its forward takes neither tokens nor images")
    if "use_cache" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        given.pop("use_cache", None)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            out = model(**given)
    except Exception as error:
        raise NotMade(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]) from error
    values = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else (out,)
    first = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
    if first is None:
        raise NotMade("it returns no tensor of floating numbers")
    return first


def walk(name: str) -> Family:
    """Swaps family ``name`` and holds its report against what ran. Raises NotMade."""
    original, kind = make(name)
    expected = run(original, kind)
    swapped = copy.deepcopy(original)
    try:
        report = fastlm.swap(swapped)
        got = run(swapped, kind)
    except Exception as error:  # noqa: BLE001  (a line of the table)
        return Family(name, kind, 0, 0, 0, 0, (), f"swapped it fails: {type(error).__name__}: {error}"[:200])
    seen = {(row.module, row.now): row for row in report.seen}
    ran = {path for (path, _), row in seen.items() if row.ran}
    attention = {row.module for row in report.rows if "attention" in row.now}
    why = Counter(text for row in seen.values() for text, _ in row.why)
    left = Counter(_kind_of(text) for _, _, text in report.left)
    silent = {path for path in _attentions(swapped) if not _mentioned(path, report)}
    broken = ""
    close = max(
        1e-4 * float(expected.abs().max()), torch.finfo(expected.dtype).tiny
    )  # an untrained model may give nothing
    if not torch.allclose(got, expected, rtol=1e-3, atol=close, equal_nan=True):
        broken = f"its output is off by {float((got - expected).abs().max()):.1e}"
    elif silent:
        broken = f"nothing is said of {', '.join(sorted(silent)[:2])}"
    fused = sum(row.now.startswith("fused") for row in report.rows)
    norms = sum(row.now.startswith("norm") for row in report.rows)
    counted = len(_attentions(swapped) | attention)
    reasons = tuple((why + left).most_common())
    return Family(name, kind, counted, len(attention & ran), norms, fused, reasons, broken)


def _attentions(model: nn.Module) -> set[str]:
    """Modules that attend by their class's name, and have no such module within."""
    named = {path: m for path, m in model.named_modules() if re.search(r"attention$|attn$", type(m).__name__, re.I)}
    return {path for path in named if not any(other != path and other.startswith(f"{path}.") for other in named)}


def _mentioned(path: str, report: fastlm.swap.Report) -> bool:  # type: ignore[name-defined]
    told = {row.module for row in report.rows if "attention" in row.now} | {where for where, _, _ in report.left}
    return any(path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.") for other in told if other)


def _kind_of(why: str) -> str:
    return re.sub(r"\d[\d., ]*", "", why)


def table(families: list[Family], unmade: dict[str, str]) -> str:
    """The page."""
    whole = [f for f in families if f.served == f.attentions > 0]
    lines = [
        "# What swap serves of transformers",
        "",
        "`python tests/swap/families.py --write docs/transformers.md` makes this page, and a test holds it against the",
        f"library. It was made with transformers {transformers.__version__}, on the CPU, with tiny models in float32.",
        "",
        f"Of {len(families)} families that a tiny configuration makes, {len(whole)} have all their attention served.",
        "Attention is counted when the op ran in the first forward, not when swap said that it would.",
        "Where a chain stays apart, its norms and dropouts are served one by one.",
        "",
        "| family | made as | attention served | norms | fused blocks | what is left, and why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for f in families:
        said = [*([f"BROKEN: {f.broken}"] if f.broken else []), *(f"{text} ({times})" for text, times in f.reasons)]
        why = "; ".join(said) or "nothing"
        why = why.replace("|", "\\|")
        lines.append(f"| {f.name} | {f.kind} | {f.served} of {f.attentions} | {f.norms} | {f.fused} | {why} |")
    lines += ["", f"## Not made: {len(unmade)} families", ""]
    lines += [f"- {name}: {why}".replace("<", "\\<") for name, why in unmade.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    families, unmade = [], {}
    for name in given.families or names():
        try:
            families.append(walk(name))
            f = families[-1]
            print(
                f"{name}: {f.served} of {f.attentions}, {f.norms} norms, {f.fused} fused {f.reasons} {f.broken}",
                flush=True,
            )
        except NotMade as error:
            unmade[name] = str(error)
            print(f"{name}: not made: {error}", flush=True)
    if given.write:
        given.write.write_text(table(families, unmade))
    return 1 if any(f.broken for f in families) else 0


if __name__ == "__main__":
    sys.exit(main())
