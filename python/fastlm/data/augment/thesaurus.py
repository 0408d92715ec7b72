"""Words replaced by synonyms from a MyThes thesaurus (the format of LibreOffice, which Debian ships for 27 languages).

A word is replaced by one of the same part of speech and in the same form (lemminflect). Names, numbers, code, quotations,
short words and words whose part of speech is in doubt stay.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from pathlib import Path

from fastlm.data.augment.text import WORD, kept, needed
from fastlm.data.errors import InputError

FOLDERS = ("/usr/share/mythes", "/usr/share/myspell/dicts", "/usr/share/hunspell", "/opt/homebrew/share/mythes")
UPOS = {"(noun)": "NOUN", "(verb)": "VERB", "(adj)": "ADJ", "(adv)": "ADV"}
SHORT = 4  # shorter words are mostly function words
CANDIDATES = 8
Score = Callable[[list[str]], list[float]]  # loss of each text; the least wins


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_KEPT = _words(
    "that this these those with from into onto upon over under than then them they their there here have "
    "having been being were will would shall should could might must does doing done when where which while "
    "whose whom what some such same each every both either neither none only also very much many more most "
    "less least other another just even still about above after again against before below between during "
    "because until since whether though although however therefore else like unlike your yours ours mine "
    "itself himself herself themselves itself once first last next following follows"
)
_DETERMINERS = _words("the a an this that these those its his her their my your our each every any some no")
_AFTER_NOUN = _words("of is are was were in on at by for with from to and or that which has have had can will")
_BEFORE_VERB = _words("to will would can could may might must should shall cannot not")


def find(name: str, language: str) -> Path:
    """The file that `--thesaurus FILE|auto` means. Raises InputError with the line that brings one."""
    if name != "auto":
        if not Path(name).expanduser().is_file():
            raise InputError(f"--thesaurus: there is no file {name}; give a MyThes .dat file, or auto")
        return Path(name).expanduser()
    for folder in FOLDERS:
        found = sorted(Path(folder).glob(f"th_{language}*.dat"))
        if found:
            return next((p for p in found if p.name.startswith("th_en_US")), found[0])
    package = "mythes-en-us" if language == "en" else f"mythes-{language}"
    raise InputError(
        f"--thesaurus auto finds no th_{language}*.dat in {', '.join(FOLDERS)}: apt-get install {package}, or name a file"
    )


class Thesaurus:
    """A MyThes file: which words it has and where, the entries read as they are asked for."""

    def __init__(self, path: Path, language: str = "en") -> None:
        self.path, self.language = path, language
        self.places: dict[str, int] = {}
        try:
            self.file = open(path, "rb")  # noqa: SIM115
            self.encoding = self.file.readline().decode("ascii").strip()
            at = self.file.tell()
            while line := self.file.readline():
                word, count = line.decode(self.encoding).rstrip("\r\n").rsplit("|", 1)
                self.places[word] = at
                for _ in range(int(count)):
                    self.file.readline()
                at = self.file.tell()
        except (ValueError, LookupError) as error:
            raise InputError(f"{path} is no MyThes thesaurus: {error}") from None
        self.synonyms = functools.lru_cache(maxsize=65536)(self._synonyms)
        self.forms = functools.lru_cache(maxsize=65536)(self._forms)
        self._inflect = needed("lemminflect", "replacing words in English") if language == "en" else None

    def _synonyms(self, word: str, upos: str) -> tuple[tuple[str, ...], ...]:
        """One-word synonyms by sense, of senses of that part of speech ("": of any); more general words are none."""
        if word not in self.places:
            return ()
        self.file.seek(self.places[word])
        count = int(self.file.readline().decode(self.encoding).rsplit("|", 1)[1])
        out = []
        for _ in range(count):
            kind, *others = self.file.readline().decode(self.encoding).strip().split("|")
            if upos and UPOS.get(kind.strip().lower()) != upos:
                continue
            plain = tuple(o for o in others if re.fullmatch(r"[^\W\d_]{3,}", o) and o != word and o.islower())
            if plain:
                out.append(plain)
        return tuple(out)

    def _forms(self, word: str) -> tuple[tuple[str, str, str], ...]:
        """(part of speech, lemma, Penn tag) that a word may be."""
        if self._inflect is None:
            return (("", word, ""),)
        out = []
        for upos, lemmas in self._inflect.getAllLemmas(word).items():
            if upos not in UPOS.values():
                continue
            for lemma in lemmas[:1]:
                for tag, forms in self._inflect.getAllInflections(lemma, upos).items():
                    if word in forms:
                        out.append((upos, lemma, tag))
        return tuple(out)

    def inflected(self, lemma: str, upos: str, tag: str) -> str:
        """The lemma in a form, or "" where it has none (it is no word of that part of speech)."""
        if self._inflect is None:
            return lemma
        if upos not in self._inflect.getAllLemmas(lemma) or lemma not in self._inflect.getAllLemmas(lemma)[upos]:
            return ""
        found = self._inflect.getInflection(lemma, tag, inflect_oov=False)
        return found[0] if found else ""

    def candidates(self, word: str, before: str, after: str, wide: bool) -> list[str]:
        """What may stand in a word's place between its neighbours; `wide`: of all senses, not of the first alone."""
        forms = self.forms(word)
        kinds = {upos for upos, lemma, _ in forms if self.synonyms(lemma, upos)} | {f[0] for f in forms}
        if len(kinds) > 1:
            noun = before in _DETERMINERS and (not after or after in _AFTER_NOUN)
            verb = before in _BEFORE_VERB and kinds <= {"NOUN", "VERB"}  # not "from left to right"
            kinds &= {"NOUN"} if noun else {"VERB"} if verb else set()
        if len(kinds) != 1:
            return []
        upos = next(iter(kinds))
        own = [f for f in forms if f[0] == upos]
        tags = {f[2] for f in own}
        if tags - {"VB", "VBP"} and len(tags) > 1:  # walked: past or participle, which differ in other verbs
            return []
        _, lemma, tag = own[0]
        senses = self.synonyms(lemma, upos)
        out = []
        for other in dict.fromkeys(o for sense in (senses if wide else senses[:1]) for o in sense):
            made = self.inflected(other, upos, tag)
            vowel = before not in ("a", "an") or (made[:1] in "aeiou") == (word[:1] in "aeiou")
            if made and made != word and vowel:
                out.append(made)
        return out[:CANDIDATES]


def replace(
    sentence: str, rate: float, thesaurus: Thesaurus, rng: random.Random, score: Score | None = None
) -> tuple[str, int]:
    """A sentence with about `rate` of its words replaced, and how many were. `score` chooses among synonyms."""
    stays = [(start, end) for start, end, _ in kept(sentence)]
    words = list(WORD.finditer(sentence))
    places = []
    for i, match in enumerate(words):
        word, (start, end) = match.group(), match.span()
        token = sentence[sentence.rfind(" ", 0, start) + 1 : (sentence.find(" ", end) + 1 or len(sentence) + 1) - 1]
        if (
            len(word) >= SHORT and word.islower() and word.isalpha() and word not in _KEPT
            and "-" not in token
            and not any(a < end and start < b for a, b in stays)
        ):  # fmt: skip
            before = words[i - 1].group().lower() if i and not sentence[words[i - 1].end() : start].strip() else ""
            after = words[i + 1].group().lower() if i + 1 < len(words) else ""
            if i + 1 < len(words) and sentence[end : words[i + 1].start()].strip():
                after = ""
            if found := thesaurus.candidates(word, before, after, wide=score is not None):
                places.append((start, end, found))
    wanted = rate * len(words)
    count = int(wanted) + (rng.random() < wanted - int(wanted))
    chosen = sorted(rng.sample(places, min(count, len(places))), reverse=True)  # from the end: places stay right
    for start, end, found in chosen:
        texts = [sentence[:start] + other + sentence[end:] for other in found]
        if score is None:
            sentence = texts[rng.randrange(len(texts))]
        else:
            losses = score(texts)
            sentence = texts[losses.index(min(losses))]
    return sentence, len(chosen)
