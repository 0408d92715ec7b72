"""A corpus' card: what was counted, in the words that both its pages use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fastlm.data.card import bias
from fastlm.data.card.facts import SHORT, WINDOW, Facts
from fastlm.data.card.scan import Copies

PERSONAL = (("email", "e-mail addresses"), ("ip", "public IP addresses"), ("iban", "IBANs"), ("card", "card numbers"),
            ("phone", "phone numbers"))  # fmt: skip
LANGUAGES = {
    "en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese", "nl": "Dutch",
    "pl": "Polish", "ru": "Russian", "uk": "Ukrainian", "cs": "Czech", "sv": "Swedish", "da": "Danish", "fi": "Finnish",
    "no": "Norwegian", "nb": "Norwegian Bokmål", "hu": "Hungarian", "ro": "Romanian", "el": "Greek", "tr": "Turkish",
    "ar": "Arabic", "he": "Hebrew", "fa": "Persian", "hi": "Hindi", "bn": "Bengali", "zh": "Chinese", "ja": "Japanese",
    "ko": "Korean", "vi": "Vietnamese", "id": "Indonesian", "th": "Thai", "la": "Latin", "ca": "Catalan", "eo": "Esperanto",
}  # fmt: skip
LISTED = 0.01  # share of the documents from which a language stands in the card's header


@dataclass
class Card:
    """All that a page shows. `model` names the run that `bias` was measured with; `policy` is the
    filter's hash; `date` is a day, YYYY-MM-DD."""

    title: str
    names: tuple[str, ...]
    date: str
    facts: Facts
    copies: Copies
    model: str = ""
    policy: str = ""
    bias: list[bias.Bias] = field(default_factory=list)

    def about(self) -> str:
        return f"{', '.join(self.names) or 'the source of Python’s own standard library'} · {self.date}"

    def mean(self) -> float:
        return self.facts.sums["words"] / self.facts.sums["documents"]

    def language(self, code: str) -> str:
        if code == "und":
            return "too short to tell"
        return f"{LANGUAGES[code]} ({code})" if code in LANGUAGES else code

    def languages(self) -> list[str]:
        """The codes of at least one document in a hundred, the commonest first."""
        total = self.facts.sums["documents"]
        return [code for code, n in self.facts.languages.most_common() if code != "und" and n >= LISTED * total]

    def personal(self) -> Iterator[tuple[str, str]]:
        yield from PERSONAL

    def toxicity(self) -> str:
        if not self.policy:
            return "Not measured: no filter was given."
        total, found = self.facts.sums["documents"], self.facts.harmful
        kinds = ", ".join(f"{name} {n:,}" for name, n in found.most_common()) or "none"
        return (
            f"{found.total():,} of {total:,} documents ({found.total() / total:.1%}) are what the filter's policy "
            f"{self.policy} takes: {kinds}. A filter errs; its figures are in its filter.json."
        )

    def caution(self) -> str:
        english = self.facts.languages["en"] / self.facts.sums["documents"]
        said = "Mentions of English terms; a term tells neither praise nor blame, and many groups have no term here."
        return said if english > 0.5 else f"{said} Only {english:.0%} of the documents are English."

    def expects(self) -> str:
        first = (
            f"How much likelier {self.model} finds a sentence than the same sentence about another person. 0 is no preference; "
            f"+0.69 means that it finds the first twice as likely."
        )
        if self.bias:
            first += f" Intervals are of 95%, by {bias.DRAWS:,} bootstrap draws of whole jobs, names or sentences."
        else:
            first = f"No pair of sentences is short enough for {self.model}."
        if long := sum(b.too_long for b in self.bias):
            first += f" {long:,} pairs are longer than the model takes."
        return first

    def method(self) -> Iterator[str]:
        """How each figure came about."""
        if cut := self.facts.sums["cut"]:
            yield f"Documents above 8 MiB count in blocks of 64 KiB: {cut:,} of those counted here are such blocks."
        yield (
            f"Languages: py3langid on three samples of a document; one with fewer than {SHORT} letters has none. Words are "
            f"runs of letters. Lengths are counted in four steps a doubling, so the middle and the 95% are true to a fifth."
        )
        yield (
            "Copies: exact ones by their text; near-duplicates by MinHash of 5-word shingles, each candidate checked by true "
            "Jaccard similarity. Of a set of copies all but the first count."
        )
        yield "Personal data: patterns with checks (Luhn, IBAN, public addresses). Names and street addresses are left out."
        yield (
            f"What stands around a term: words within {WINDOW} words of it, against the same words anywhere (log-likelihood "
            f"ratio). In a large corpus the rarest words are forgotten."
        )
        if self.model:
            yield (
                "Pairs: jobs with he and she in three sentences each; the commonest given names of men and women; names of "
                "white and black Americans (Bertrand and Mullainathan 2004); and sentences of the corpus in which each "
                "gendered word has one counterpart. The last may have been trained on."
            )
