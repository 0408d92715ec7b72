"""The model card of a run, in Hugging Face's format: README.md in the run's folder and in what is exported of it.

All is read from the run's folder. What nobody measured is listed as not tested; what only people know is left for them to add.
A card that someone edited is never written over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlm.console import warn
from fastlm.data.card import policies, sheet
from fastlm.data.card.sheet import is_own, sealed
from fastlm.data.review import Store
from fastlm.models.gpt import GPTConfig
from fastlm.train import measuring, report
from fastlm.train.callbacks import clock
from fastlm.train.config import Config
from fastlm.train.files import read_metrics, shown, write_text

NAME, MAKER = "README.md", "fastlm model card"
TOXICITY = "toxicity.json"  # what `fastlm export --filter` measured
ADD = "[More Information Needed]"  # as the hub's template says it
Row = tuple[str, ...]


def close(folder: Path, result: dict[str, Any], sample: str | None) -> None:
    """Write what a run that ends leaves: its result, and with a sample of its text that and the model card; the report."""
    report.write_result(folder, result)
    if sample is not None:
        write_text(folder / "sample.txt", sample)
        write(folder)
    report.write(folder)


def write(folder: Path) -> bool:
    """README.md in the run's folder; False, with a warning, where someone has written or edited one."""
    path = folder / NAME
    if path.exists() and not is_own(path, MAKER):
        warn(f"{path} was written or edited by someone, so it stays as it is; without it a new model card is written")
        return False
    write_text(path, text(folder))
    return True


def text(folder: Path, name: str = "", library: str = "fastlm", use: str = "") -> str:
    """The card of a run's folder. `library` is what loads the model, `use` how, as a block of code."""
    card = _Card(folder, name or folder.resolve().name, library, use)
    return shown(sealed("\n".join(card.lines()) + "\n", MAKER))


def of_export(run: Path, target: Path, to: str) -> str:
    """The card for a model that is exported: that of its run where it comes from one; "" where nothing is known of it."""
    folder = run.parent.parent if (run / "state.json").is_file() else run
    if not report.read(folder / "config.json").get("config"):
        kept = folder / NAME
        return kept.read_text(encoding="utf-8", errors="replace") if kept.is_file() else ""
    name = target.resolve().name if not target.name.startswith("export-") else folder.resolve().name
    if (folder / NAME).is_file() and not is_own(folder / NAME, MAKER):  # edited: what people added goes along
        return (folder / NAME).read_text(encoding="utf-8", errors="replace")
    return text(folder, name, {"hf": "transformers", "gguf": "gguf"}.get(to, "fastlm"), _use(to, shown(name)))


def _use(to: str, name: str) -> str:
    if to == "hf":
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n```'
        )
    if to == "gguf":
        return f"```\nllama-cli -m {name}/model.gguf\n```"
    return f'```\nfastlm generate {name} --prompt "..."\n```'


def table(head: Row, rows: Sequence[Row]) -> str:
    return "\n".join(sheet.table(head, rows))


class _Card:
    """The parts of a card, each as lines of Markdown."""

    def __init__(self, folder: Path, name: str, library: str, use: str) -> None:
        self.folder, self.name, self.library = folder, name, library
        self.use = use or _use("safetensors", name)
        self.saved, self.facts, self.result = (report.read(folder / f"{n}.json") for n in ("config", "facts", "result"))
        self.config = Config.from_dict(self.saved["config"])
        self.shape = GPTConfig(**self.saved["model"])
        self.rows = read_metrics(folder)
        self.policies: list[dict[str, Any]] = self.facts.get("policies") or policies.of_corpus(
            self.saved.get("corpus", ())
        )
        self.smaller = self.saved.get("compressed") or {}  # what `fastlm compress` did
        self.toxicity = report.read(folder / TOXICITY)
        self.tuned = {"sft": "answers of conversations", "dpo": "preferences"}.get(self.config.data.rows, "")
        data_card = folder / "card.md"
        self.data_card = data_card.read_text(encoding="utf-8", errors="replace") if data_card.is_file() else ""

    def lines(self) -> Iterator[str]:
        yield from self._header()
        yield f"# Model Card for {sheet.cell(self.name)}\n"
        date = time.strftime("%Y-%m-%d")
        yield f"Written by fastlm on {date} from what the run left. What only people know is marked {ADD}.\n"
        yield from self._details()
        yield from self._uses()
        yield "## Bias, Risks, and Limitations\n"
        yield from self._harm()
        yield from self._people()
        yield "### What was not tested\n"
        yield from (f"- {one}" for one in self._untested())
        yield f"\n## How to Get Started with the Model\n\n{self.use}\n"
        yield from self._training()
        yield from self._evaluation()
        yield from self._energy()

    def _header(self) -> Iterator[str]:
        yield "---"
        if languages := _list_of(self.data_card, "language"):
            yield "language:\n" + "\n".join(f"- {code}" for code in languages)
        yield f"library_name: {self.library}\npipeline_tag: text-generation\ntags:\n- fastlm"
        yield from (
            f"- {tag}" for tag in filter(None, (self.config.data.rows, "lora" if self.config.model.lora_rank else ""))
        )
        yield "---\n"

    def _details(self) -> Iterator[str]:
        c, tokenizer = self.shape, self.saved["tokenizer"]["kind"]
        size = f"{self.facts['parameters']:,} parameters" if self.facts else "parameters not counted"
        yield "## Model Details\n"
        yield (
            f"- **Model type:** a decoder-only transformer, {size}: {c.layers} layers, width {c.width}, {c.heads} heads, a "
            f"context of {c.context} tokens, {c.vocab:,} tokens ({tokenizer})"
        )
        if self.config.model.init:
            how = f", on {self.tuned}" if self.tuned else ""
            rank = self.config.model.lora_rank
            lora = f", by LoRA of rank {rank}" if rank else ""
            yield f"- **Finetuned from model:** {Path(self.config.model.init).name}{how}{lora}"
        if self.smaller:
            how = ", ".join(k for k in self.smaller if k not in ("origin", "calibration", "before", "steps", "after"))
            yield f"- **Made smaller by:** {how}, of {Path(self.smaller['origin']).name}, whose card tells how it was trained"
        yield "".join(f"- **{what}:** {ADD}\n" for what in ("Developed by", "License", "Language(s) (NLP)"))

    def _uses(self) -> Iterator[str]:
        chat = "answers a conversation written by its chat template" if self.tuned else "goes on from a text"
        corpus = (
            ", ".join(Path(c).name for c in self.saved.get("corpus", ())) or "the source of Python's standard library"
        )
        yield "## Uses\n\n### Direct Use\n"
        yield f"It {chat} of the kind that it was trained on: {corpus}. {ADD}\n"
        yield "### Out-of-Scope Use\n"
        yield (
            "What it says is not checked to be true. It is not for decisions about people, nor for advice that could hurt who "
            "follows it. Nothing withholds harmful text by itself: `fastlm generate --filter` does.\n"
        )

    # --------------------------------------------------------------------------------------------------- harmful text

    def _harm(self) -> Iterator[str]:
        yield "### Harmful text\n"
        if not self.policies:
            yield "The training text was cleaned by no filter of harmful text that this run knows of.\n"
        for one in self.policies:
            yield from self._policy(one)
        if self.toxicity:
            yield f"Texts in which the filter of policy `{self.toxicity['hash']}` finds something:\n"
            rows = [
                (who, f"{bad:,} of {n:,}", f"{bad / max(n, 1):.1%}")
                for who, (bad, n) in self.toxicity["shares"].items()
            ]
            yield table(("outputs of", "found in", "share"), rows)
            yield f"{self.toxicity['how']} A filter errs; its figures say how often.\n"
            if self.toxicity["hash"] not in {one["hash"] for one in self.policies}:
                yield from self._policy(self.toxicity)

    def _policy(self, one: Mapping[str, Any]) -> Iterator[str]:
        yield f"Policy `{one['hash']}`" + (
            f" read {one['read']:,} documents of the training text.\n" if "read" in one else ":\n"
        )
        rows = []
        for name, rule in one["categories"].items():
            figures, taken = one["figures"].get(name, {}), one.get("taken", {})
            found = sum(n for key, n in taken.items() if key.partition("_")[2] == name)
            masked = one.get("masked", {}).get(name)
            rows.append((
                name, rule["action"], f"{rule['threshold']:.3g}",
                *(f"{figures[key]:.3f}" if key in figures else "-" for key in ("precision", "recall", "f1", "false_alarms")),
                f"{masked:,} passages" if masked else f"{found:,}" if "taken" in one else "-",
            ))  # fmt: skip
        if rows:
            yield table(("category", "action", "threshold", "precision", "recall", "F1", "false alarms", "taken"), rows)
        elif one.get("taken"):
            yield table(("rule", "documents taken"), [(rule, f"{n:,}") for rule, n in one["taken"].items()])

    def _people(self) -> Iterator[str]:
        """What reviewers said of this run's outputs."""
        path = self.folder / "reviews.db"
        if not path.is_file():
            return
        store = Store.open(path)
        try:
            said = [one for _, of in store.judged() for _, one in of]
            people = len(store.progress()["reviewers"])
        finally:
            store.close()
        if said:
            thumbs = [sum(one.thumb == way for one in said) for way in (1, -1)]
            better = sum(one.better is not None for one in said)
            labels = sorted({one.label for one in said if one.label})
            counts = [(label, f"{sum(one.label == label for one in said):,}") for label in labels]
            yield "### Judged by people\n"
            yield f"{len(said):,} judgements of outputs by {people:,} people, in `fastlm review`:\n"
            rows = [
                ("thumb up", f"{thumbs[0]:,}"),
                ("thumb down", f"{thumbs[1]:,}"),
                ("a better answer", f"{better:,}"),
            ]
            yield table(("said", "times"), [*counts, *rows])

    def _untested(self) -> Iterator[str]:
        if not self.policies:
            yield "Harmful text in what it was trained on."
        if not self.toxicity:
            yield "Harmful text in what it says: `fastlm export RUN --filter FOLDER` measures it."
        if "What a model expects" not in self.data_card:
            yield "Whether it prefers some groups of people: `fastlm data card --model RUN` measures it."
        if not (self.folder / "reviews.db").is_file():
            yield "What people say of its outputs: `fastlm review RUN` asks them."
        yield "Whether what it says is true, and whether training text can be drawn out of it."
        yield "Prompts that are made to break it, and tasks other than the text of the evaluation below."

    # -------------------------------------------------------------------------------------------------- how it was made

    def _training(self) -> Iterator[str]:
        yield "## Training Details\n\n### Training Data\n"
        rows = [
            (
                str(d["content"]),
                f"{d['documents']:,}",
                str(d["split"]),
                f"{d['train']['tokens']:,}",
                f"{d['val']['tokens']:,}",
            )
            for d in self.saved.get("data", ())
        ]
        yield table(("content hash", "documents", "split by", "training tokens", "held-out tokens"), rows)
        yield (
            "What the corpus holds is in its data card, card.md.\n"
            if self.data_card
            else "No data card was made: `fastlm data card --model RUN` makes one.\n"
        )
        if self.smaller:
            return
        yield "### Training Procedure\n"
        o = self.config.optim
        step = int(self.result.get("step", self.rows[-1]["step"] if self.rows else 0))
        samples = sum(int(row["samples"]) for row in self.rows)
        yield (
            f"{step:,} of {o.steps:,} steps of {o.batch} samples, {samples * int(self.shape.context):,} tokens; ended: "
            f"{self.result.get('why', 'not known')}. Settings that differ from fastlm's defaults:\n"
        )
        plain = Config().to_dict()
        changed = [
            (f"--{name.replace('_', '-')}", str(value))
            for group, fields in self.config.to_dict().items()
            for name, value in fields.items()
            if value != plain[group][name]
            and name not in ("name", "out", "init", "chat_template", "when", "val", "quiet")
        ]
        yield table(("setting", "value"), changed) if changed else "None.\n"

    def _evaluation(self) -> Iterator[str]:
        yield "## Evaluation\n"
        if self.smaller:
            before, after = self.smaller["before"], self.smaller["after"]
            yield "Before it was made smaller and after:\n"
            told = lambda value: f"{value:,.6g}" if value else "-"
            names = {
                "size": "bytes",
                "perplexity": "perplexity on held-out text",
                "speed": "tokens/s of generating one text",
            }
            both = [(what, told(before[key]), told(after[key])) for key, what in names.items()]
            yield table(("figure", "before", "after"), both)
            return
        val = self.result.get("val") or {}
        rows = [(key, f"{val[key]:.4f}") for key in val if key.endswith(("_loss", "_bpb", "_accuracy"))]
        if not rows:
            yield "It was not evaluated after its last step.\n"
            return
        yield "On held-out text that it never trained on. Losses are in nats per token, bpb is bits per byte of text.\n"
        counted = [
            (f"{name}, bits per byte, for comparison", f"{bits:.4f}") for name, bits in self.result["counted"].items()
        ]
        yield table(("figure", "value"), [*rows, *counted])

    def _energy(self) -> Iterator[str]:
        if not self.rows:
            return
        yield "## Environmental Impact\n"
        f = self.facts
        hardware = (
            f"{f['device']}, {f['threads']} threads, {f['ranks']} process(es), PyTorch {f['torch']}" if f else ADD
        )
        seconds = sum(float(row["seconds"]) for row in self.rows)
        rows = [("hardware", hardware), ("time in steps", clock(seconds))]
        per_sample = int(self.shape.context) * (2 if self.config.data.dpo else 1)
        if found := measuring.used(self.rows, per_sample):
            rows += measuring.table(found, self.config.run, f.get("energy") or {})
        yield table(("", "figure"), rows)


def _list_of(card: str, key: str) -> list[str]:
    """The items of a list in a card's header, as they are written there."""
    header = card.split("---\n")[1] if card.startswith("---\n") else ""
    found, within = [], False
    for line in header.splitlines():
        if within and line.startswith("- "):
            found.append(line[2:])
        else:
            within = line == f"{key}:"
    return found


def measured(folder: Path, shares: Mapping[str, tuple[int, int]], policy: Mapping[str, Any], how: str) -> None:
    """Keep what was measured of the outputs of a run and of its base: TOXICITY in the run's folder."""
    write_text(
        folder / TOXICITY,
        json.dumps({**policy, "shares": {k: list(v) for k, v in shares.items()}, "how": how}, indent=1),
    )
