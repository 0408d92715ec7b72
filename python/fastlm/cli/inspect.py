"""`fastlm inspect [RUN] --prompt "..."`: what a trained model does with a text, as one page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from fastlm import console
from fastlm.cli import flags
from fastlm.cli.data import SpecialTokens, special_tokens_of
from fastlm.data.bounds import COUNT, Range, check
from fastlm.data.errors import InputError
from fastlm.data.tokenizer import ByteTokenizer, Tokenizer
from fastlm.inspect import look, page, theirs
from fastlm.inspect.views import STEPS
from fastlm.train import job
from fastlm.train.files import shown, write_text

EXAMPLES = """
fastlm inspect myrun --prompt "def main():"     # myrun/inspect.html
fastlm inspect gpt2 --prompt "The cat sat" --layer 5 --page cat.html
"""


def inspect(
    run: tyro.conf.Positional[str] = "",
    prompt: str = "",
    layer: int | None = None,
    head: int | None = None,
    saliency: Literal["auto", "each", "text"] = "auto",
    steps: int = STEPS,
    kernels: Literal["torch", "fused"] = "torch",
    special_tokens: SpecialTokens = "run",
    device: str = "auto",
    page_file: Annotated[str, tyro.conf.arg(name="page")] = "",
    out: str = "runs",
) -> int:
    """Look at what a trained model does with a text: loss, attention, logit lens and saliency in one page of HTML.

    Args:
        run: Run, checkpoint or exported folder to take, or one of transformers, by path or name; without one, the last run.
        prompt: Text to look at, of two tokens or more.
        layer: Layer whose attention the page opens with, from 0; without it, one in the middle.
        head: Head of that layer, from 0.
        saliency: each: for each token apart. text: for the whole text. auto: each where that takes no more than minutes.
        steps: Steps of the integral of the saliency.
        kernels: fused: with the kernels of `fastlm.swap` in the model, as in training. torch: without.
        special_tokens: text: what looks like a special token in the prompt is text. read: it becomes that token. run: as the
            run was trained.
        device: auto, cpu, cuda or mps.
        page_file: File to write; without it, RUN/inspect.html.
        out: Folder of runs.
    """
    for name, value, allowed in (
        ("layer", layer, Range(0, COUNT)),
        ("head", head, Range(0, COUNT)),
        ("steps", steps, Range(1, 1024)),
    ):
        if value is not None:
            check(name, value, allowed)
    folder = job.find_run(run, out)
    target = Path(page_file).expanduser() if page_file else folder / "inspect.html"
    _refuse_target(target)
    model, tokenizer = _load(folder, device, special_tokens_of(special_tokens))
    tokens = _tokens(model, tokenizer, prompt)
    if kernels == "fused":
        import fastlm

        fastlm.swap(model)
    found = look.look(model, tokenizer, tokens, look.Wanted(layer, head, saliency, steps), console.warn)
    size = sum(p.numel() for p in model.parameters())
    about = f"{type(model).__name__}, {size / 1e6:,.2f} M parameters, {found['attention']['layers']} layers" + (
        ", kernels of fastlm" if kernels == "fused" else ""
    )
    text = page.page(found, folder.resolve().name, about)
    write_text(target, shown(text))  # a folder may have a name that is no text
    losses = found["loss"][1:]
    print(f"{len(losses) + 1:,} tokens, {sum(losses) / len(losses):.4f} nats a token; the first guess was right for "
          f"{sum(r == 1 for r in found['rank'][1:])} of {len(losses):,}")  # fmt: skip
    print(f"{target} ({len(text) / 1e6:.1f} MB)")
    return 0


def _refuse_target(target: Path) -> None:
    """InputError, before anything is computed, for a file that cannot be written or is not a page of ours."""
    if target.is_dir():
        raise InputError(f"--page must be a file; {target} is a folder")
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"cannot write {target}: {target.parent} is not writable; --page names another file")
    if target.exists() and not page.is_own(target):
        raise InputError(
            f"{target} exists and is no page of fastlm inspect: it is not overwritten; choose another --page"
        )


def _load(folder: Path, device: str, special_tokens: str) -> tuple[nn.Module, Tokenizer]:
    """The model and tokenizer; of a folder of transformers the model is transformers' own, where that is installed."""
    kind = None
    if not (folder / "state.json").is_file():
        try:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{folder / 'config.json'} cannot be read: {error}") from None
    if kind is not None and theirs.installed():
        return theirs.load(folder, job.pick_device(device)), _their_tokenizer(folder, special_tokens)
    return job.load(folder, device, special_tokens)


def _their_tokenizer(folder: Path, special_tokens: str) -> Tokenizer:
    from fastlm.data import tokenizer as tokenizers
    from fastlm.train import export

    spec = export.read_tokenizer(folder)
    if spec is None:
        raise InputError(f"{folder} holds no tokenizer.json, so there is no telling what its tokens mean")
    return tokenizers.load(spec, special_tokens)


def _tokens(model: nn.Module, tokenizer: Tokenizer, prompt: str) -> Tensor:
    """The prompt's tokens [1, L]; InputError for what the model cannot read or a page cannot show."""
    try:
        given = prompt.encode()
    except UnicodeEncodeError:
        given = os.fsencode(prompt)
        if not isinstance(tokenizer, ByteTokenizer):
            raise InputError(f"--prompt must be UTF-8, unless tokens are bytes; it is {given!r}") from None
    ids = (tokenizer.encode(given) if given else np.empty(0)).astype("int64")
    if len(ids) < 2:
        raise InputError(f"--prompt must have two tokens or more, since the first has no loss; it has {len(ids)}")
    config = getattr(model, "config", None)
    context = next(
        (c for name in ("context", "max_position_embeddings", "n_positions") if (c := getattr(config, name, None))),
        None,
    )
    longest = min(context or look.LONGEST, look.LONGEST)
    if len(ids) > longest:
        why = "the model's context is" if longest == context else "a page shows at most"
        raise InputError(f"--prompt has {len(ids):,} tokens, and {why} {longest:,}: shorten it")
    return torch.as_tensor(ids, device=next(model.parameters()).device)[None]


def main(argv: list[str]) -> int:
    return flags.call(inspect, "fastlm inspect", argv, EXAMPLES)
