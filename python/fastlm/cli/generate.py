"""`fastlm generate [RUN ...] --prompt "..."`: continue a prompt, token by token, to the terminal."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable

import torch
import tyro

from fastlm.cli import conversation, flags
from fastlm.cli.data import SpecialTokens, special_tokens_of
from fastlm.data.bounds import COUNT, SEED, Range, check
from fastlm.data.filter import Verdict, load
from fastlm.models.ensemble import Ensemble
from fastlm.train import job, together
from fastlm.train.generation import TextStream

EXAMPLES = """
fastlm generate --prompt "def main("    # the last run
fastlm generate myrun --tokens 200 --num 3 --temperature 0.7 --top-p 0.95
fastlm generate first second third    # by the mean of their probabilities
fastlm generate myrun --chat    # a conversation with a run of --sft or --dpo
"""


def generate(
    run: tyro.conf.Positional[tuple[str, ...]] = (),
    prompt: str = "",
    tokens: int = 400,
    num: int = 1,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 1,
    special_tokens: SpecialTokens = "run",
    device: str = "auto",
    out: str = "runs",
    filter: str = "",
    redraw: int = 3,
    chat: bool = False,
    system: str = "",
) -> int:
    """Continue a prompt with a trained model.

    Args:
        run: Run, checkpoint or exported folder to take, by path or name; without one, the last run. Several are taken by
            the mean of their probabilities.
        prompt: Text to go on from.
        tokens: Tokens to generate.
        num: Texts to generate, one after the other.
        temperature: 0 takes the likeliest token, 1 samples as trained.
        top_k: Sample from this many likeliest tokens only; 0: from all.
        top_p: Sample from the likeliest tokens that hold this probability together.
        min_p: Leave out tokens less likely than this part of the likeliest.
        seed: Seed of the sampling.
        special_tokens: text: what looks like a special token in the prompt is text. read: it becomes that token, and those
            generated are shown. run: as the run was trained.
        device: auto, cpu, cuda or mps.
        out: Folder of runs.
        filter: Folder of a filter. A text is shown when it is whole and the filter's policy finds nothing in it.
        redraw: How often a text that the filter finds something in is drawn again before it is withheld.
        chat: Answer messages by the run's chat template: --prompt, or each line of standard input.
        system: With --chat, the message of the role system that the conversation begins with.
    """
    for name, value, allowed in (
        ("tokens", tokens, Range(0, COUNT)),
        ("num", num, Range(1, COUNT)),
        ("temperature", temperature, Range(0)),
        ("top_k", top_k, Range(0, COUNT)),
        ("top_p", top_p, Range(above=0, high=1)),
        ("min_p", min_p, Range(0, 1)),
        ("seed", seed, Range(*SEED)),
        ("redraw", redraw, Range(0, COUNT)),
    ):
        check(name, value, allowed)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise job.InputError(f"--prompt must be UTF-8; it is {os.fsencode(prompt)!r}") from None
    if chat and num > 1 and not prompt:
        raise job.InputError("--num answers are of one --prompt: in a conversation each message has one")
    if system and not chat:
        raise job.InputError("--system is a message of a conversation: give --chat too")
    found = load(filter) if filter else None
    folders = [job.find_run(name, out) for name in run or ("",)]
    if len(folders) > 1:
        together.need_several(folders, "generate")
    folder = folders[0]  # which has the chat template
    model, tokenizer = together.load(folders, device, special_tokens_of(special_tokens))
    if chat and isinstance(model, Ensemble):
        raise job.InputError(f"--chat is a conversation with one run; it was given {len(folders)}")
    choose = job.sampler(temperature, top_k, top_p, min_p, seed, tokenizer.vocab)
    judge = functools.partial(found.judge, whole=True) if found else None
    if chat and not isinstance(model, Ensemble):
        one = model
        talk = lambda: conversation.begin(folder, one, tokenizer, system, tokens, choose, _shower(judge, redraw))
        if not prompt:
            conversation.converse(talk(), conversation.lines())
        for number in range(num if prompt else 0):
            if num > 1:
                print(f"--- {number + 1} of {num}")
            talk().say(prompt)
        return 0
    ids = tokenizer.encode(prompt.encode()).astype("int64") if prompt else [tokenizer.eot]
    start = torch.as_tensor(ids, device=next(model.parameters()).device)[None]
    shown = _shower(judge, redraw)
    for number in range(num):
        if num > 1:
            print(f"--- {number + 1} of {num}")

        def draw(show: Callable[[str], object]) -> None:
            text = TextStream(tokenizer, ids if prompt else ())

            def stream(logits: torch.Tensor) -> torch.Tensor:
                token = choose(logits)
                show(text.push(int(token)))
                return token

            show(prompt)
            model.generate(start, tokens, stream)
            show(text.end())

        shown(draw)
    return 0


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _shower(judge: Callable[[str], Verdict | None] | None, redraw: int) -> Callable[[conversation.Draw], bool]:
    """What shows a text, and says whether it did: as it is drawn, or with a filter what `_passed` gives."""

    def shown(draw: conversation.Draw) -> bool:
        if judge is None:
            draw(_show)
            _show("\n")
            return True
        text, passed = _passed(draw, judge, redraw)
        _show(f"{text}\n")
        return passed

    return shown


def _passed(draw: conversation.Draw, judge: Callable[[str], Verdict | None], redraw: int) -> tuple[str, bool]:
    """The first of so many more draws that a filter finds nothing in, and True; else what it found, in the text's place.

    A text is judged when it is whole: what is shown is never taken back.
    """
    for _ in range(redraw + 1):
        parts: list[str] = []
        draw(parts.append)
        verdict = judge("".join(parts))
        if verdict is None:
            return "".join(parts), True
    assert verdict is not None
    return f"[withheld: {verdict.category}; drawn {redraw + 1} times]", False


def main(argv: list[str]) -> int:
    return flags.call(generate, "fastlm generate", argv, EXAMPLES)
