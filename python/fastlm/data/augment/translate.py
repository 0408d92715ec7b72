"""Back-translation: sentences into another language and back, by Apertium as a program or by two seq2seq folders.

A round trip is kept only if its chrF (Popović 2015) to the source lies within `CHRF`, nothing in it was unknown to the
translator, and every name, number, piece of code and quotation of the source is in it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

from fastlm.data.augment.text import _EDGES, QUOTED, needed, protected
from fastlm.data.errors import InputError

CHRF = (30.0, 95.0)
_MARKS = re.compile(
    r"[*@#^$\[\]{}<>\\/]"
)  # Apertium's own signs: a sentence with one is not sent, a result with one is dropped
DROPS = ("unknown", "too far", "the same", "a name, number or quotation lost", "not translated")


class RoundTrip(Protocol):
    """Sentences there and back: each result is a sentence, "" where something in it was unknown, None where it was not
    translated."""

    def __call__(self, sentences: list[str]) -> list[str | None]: ...


def make(name: str) -> RoundTrip:
    """What `--backtranslate` names: `apertium:A-B`, or `hf:FOLDER,FOLDER`. Raises InputError where it cannot be had."""
    kind, _, rest = name.partition(":")
    if kind == "apertium" and re.fullmatch(r"\w+-\w+", rest):
        return Apertium(rest)
    folders = rest.split(",")
    if kind == "hf" and len(folders) == 2 and all(folders):
        return Seq2Seq(Path(folders[0]), Path(folders[1]))
    raise InputError(
        f"--backtranslate must be apertium:A-B, such as apertium:eng-cat, or hf:FOLDER,FOLDER; it is {name!r}"
    )


class Apertium:
    """Apertium's command, both ways. Raises InputError where the program or the pair is missing, with the apt line."""

    def __init__(self, pair: str) -> None:
        first, second = pair.split("-")
        self.pairs = (pair, f"{second}-{first}")
        line = f"apt-get install apertium apertium-{pair}"
        if not shutil.which("apertium"):
            raise InputError(f"--backtranslate apertium:{pair} needs the program apertium: {line}")
        known = subprocess.run(["apertium", "-l"], capture_output=True, text=True, check=False).stdout.split()
        for one in self.pairs:
            if one not in known:
                raise InputError(f"apertium has no pair {one} (it has {', '.join(known) or 'none'}): {line}")

    def __call__(self, sentences: list[str]) -> list[str | None]:
        sent = [i for i, s in enumerate(sentences) if not _MARKS.search(s)]
        out: list[str | None] = [None] * len(sentences)
        there = self._run(self.pairs[0], [sentences[i] for i in sent])
        known = [(i, s) for i, s in zip(sent, there) if s is not None and not _MARKS.search(s)]
        for i, s in zip(sent, there):
            out[i] = None if s is None else ""
        back = self._run(self.pairs[1], [s for _, s in known])
        for (i, _), s in zip(known, back):
            out[i] = None if s is None else "" if _MARKS.search(s) else " ".join(s.split())
        return out

    def _run(self, pair: str, texts: list[str]) -> list[str | None]:
        """One translation of each; None for one that does not come back as one paragraph."""
        if not texts:
            return []
        done = subprocess.run(
            ["apertium", "-f", "txt", pair], input="\n\n".join(texts).encode() + b"\n", capture_output=True, check=False
        )
        if done.returncode:
            why = done.stderr.decode(errors="replace").strip().splitlines()
            raise InputError(
                f"apertium {pair} ended with status {done.returncode}: {why[-1] if why else 'no reason given'}"
            )
        found = done.stdout.decode("utf-8", "replace").strip("\n").split("\n\n")
        if len(found) == len(texts):
            return [text or None for text in found]
        if len(texts) == 1:
            return [None]
        half = len(texts) // 2  # one of them broke the alignment: it is found by halving
        return self._run(pair, texts[:half]) + self._run(pair, texts[half:])


class Seq2Seq:
    """Two folders that transformers loads, such as MarianMT's; greedy, so the same each time. What is longer than a model
    takes is not translated. Raises InputError where a folder cannot be loaded."""

    def __init__(self, there: Path, back: Path, batch: int = 16) -> None:
        self.transformers = needed("transformers", "--backtranslate hf:")
        self.torch = needed("torch", "--backtranslate hf:")
        self.batch = batch
        self.legs = [self._load(folder) for folder in (there, back)]

    def _load(self, folder: Path) -> tuple[Any, Any, int]:
        if not (folder / "config.json").is_file():
            raise InputError(f"--backtranslate hf: {folder} is no folder of a transformers model (no config.json)")
        try:
            tokenizer = self.transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            model = self.transformers.AutoModelForSeq2SeqLM.from_pretrained(str(folder), local_files_only=True).eval()
        except (OSError, ValueError, ImportError) as error:
            raise InputError(
                f"--backtranslate hf: transformers cannot load {folder}: {str(error).splitlines()[0]}"
            ) from error
        limit = getattr(model.config, "max_position_embeddings", 0) or tokenizer.model_max_length
        return tokenizer, model, min(limit, 4096)

    def __call__(self, sentences: list[str]) -> list[str | None]:
        texts: list[str | None] = list(sentences)
        for tokenizer, model, limit in self.legs:
            texts = self._leg(texts, tokenizer, model, limit)
        return texts

    def _leg(self, texts: list[str | None], tokenizer: Any, model: Any, limit: int) -> list[str | None]:
        out = [None if text is None else "" for text in texts]
        lengths = {i: len(tokenizer(text)["input_ids"]) for i, text in enumerate(texts) if text}
        fits = sorted((n, i) for i, n in lengths.items() if n <= limit)
        for i, n in lengths.items():
            if n > limit:
                out[i] = None
        for at in range(0, len(fits), self.batch):
            chosen = [i for _, i in fits[at : at + self.batch]]
            given = tokenizer([texts[i] for i in chosen], return_tensors="pt", padding=True)
            given = {k: v for k, v in given.items() if k in ("input_ids", "attention_mask")}
            with self.torch.no_grad():
                made = model.generate(**given, num_beams=1, do_sample=False, max_length=limit)
            for i, ids, source in zip(chosen, made, given["input_ids"]):
                unknown = tokenizer.unk_token_id is not None and bool(
                    ((ids == tokenizer.unk_token_id).any() | (source == tokenizer.unk_token_id).any()).item()
                )
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                out[i] = "" if unknown else text
        return out


def lost(source: str, made: str, names: set[str]) -> list[str]:
    """The protected words and the quotations of the source that are not in what was made of it, as often and as they stand.

    A quotation counts with its marks: without them its words would be free for what comes after.
    """
    have = Counter(word.strip(_EDGES) for word in made.split())
    quotations = Counter(QUOTED.findall(source)) - Counter(QUOTED.findall(made))
    return sorted((Counter(protected(source, names)) - have + quotations).elements())


def judge(source: str, made: str | None, names: set[str], chrf: Any) -> str:
    """Why a round trip is dropped, one of `DROPS`, or "" if it is kept."""
    if made is None:
        return "not translated"
    if not made or any(c.isalpha() and not c.isascii() and c not in source for c in made):
        return "unknown"  # Apertium leaves some words of the other language unmarked: their letters tell
    score = chrf.sentence_score(made, [source]).score
    if score > CHRF[1] or made == source:
        return "the same"
    if score < CHRF[0]:
        return "too far"
    return "a name, number or quotation lost" if lost(source, made, names) else ""


def scorer() -> Any:
    """chrF as sacrebleu has it."""
    needed("sacrebleu", "--backtranslate")
    from sacrebleu.metrics import CHRF as Metric

    return Metric()
