"""The database of a review: items, who judged what, and an audit table that only grows.

SQLite in WAL mode with full synchronisation: what was acknowledged survives kill -9 and a power cut. Each request has a name of
its own, so one that comes twice, because its answer was lost, counts once. An item goes to a person in one window at a time and
is lent, not given: who goes offline keeps it from others for LENT seconds.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastlm.data.errors import InputError
from fastlm.data.review.items import Item, ordered

FORMAT = 1
APPLICATION = 0x666C6D72  # "flmr", by which SQLite's header says whose database it is
MAGIC = b"SQLite format 3\0"
LENT = 600.0
LONGEST = 100_000  # characters of a better answer
NAME = 60  # of a reviewer's name

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE items (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, unsure REAL NOT NULL, data TEXT NOT NULL
);
CREATE INDEX queue ON items (unsure DESC, id);
CREATE TABLE judgements (
  number INTEGER PRIMARY KEY AUTOINCREMENT, item INTEGER NOT NULL REFERENCES items (id), reviewer TEXT NOT NULL,
  label TEXT, thumb INTEGER NOT NULL, better TEXT, at REAL NOT NULL, UNIQUE (item, reviewer)
);
CREATE TABLE lent (
  item INTEGER NOT NULL, reviewer TEXT NOT NULL, "window" TEXT NOT NULL, until REAL NOT NULL, PRIMARY KEY (item, reviewer)
);
CREATE TABLE audit (
  number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, reviewer TEXT NOT NULL, action TEXT NOT NULL, item INTEGER,
  said TEXT NOT NULL, request TEXT UNIQUE
);
CREATE TRIGGER audit_stays BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit table only grows'); END;
CREATE TRIGGER audit_keeps BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit table only grows'); END;
"""

_NEXT = """
SELECT id, data FROM items
WHERE NOT EXISTS (SELECT 1 FROM judgements j WHERE j.item = items.id AND j.reviewer = :reviewer)
  AND NOT EXISTS (SELECT 1 FROM lent l WHERE l.item = items.id AND l.reviewer = :reviewer AND l."window" <> :window
                  AND l.until > :now)
  AND (:judges = 0 OR :judges > (SELECT count(*) FROM judgements j WHERE j.item = items.id)
       + (SELECT count(*) FROM lent l WHERE l.item = items.id AND l.reviewer <> :reviewer AND l.until > :now))
  AND id NOT IN (SELECT value FROM json_each(:have))
ORDER BY unsure DESC, id LIMIT :count
"""


class Conflict(Exception):
    """A judgement that cannot be taken: what it says is kept in the audit table."""


@dataclass(frozen=True)
class Judgement:
    """What a person says of an item; nothing at all is a skip. `thumb` is 1, -1 or 0."""

    label: str | None = None
    thumb: int = 0
    better: str | None = None


class Store:
    """An open database. Methods may be called from any thread."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path, self._db, self._lock = path, db, threading.RLock()

    # ------------------------------------------------------------------------------------------------------ opening it

    @classmethod
    def open(cls, path: Path) -> Store:
        """An existing database. Raises InputError for another file, or one of another version."""
        if not path.is_file():
            raise InputError(f"there is no database {path}; fastlm review makes one")
        return cls(path, _connect(path))

    @classmethod
    def make(cls, path: Path, source: str, labels: Sequence[str], judges: int) -> Store:
        """The database at `path`, made if it is not there yet.

        Args:
            source: What the items are of; it heads the page. A database of another source is refused.
            labels: The labels, by the order of their keys.
            judges: How many people judge an item; 0: everyone.
        """
        if not path.exists():
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))  # it holds the token
            except OSError as error:
                raise InputError(f"cannot write {path}: {error.strerror}") from error
        made = cls(path, _connect(path, new=True))
        with made._change():
            if not made._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                for part in _SCHEMA.split(";\n"):
                    if part.strip():
                        made._db.execute(part)
                values = {"source": source, "token": secrets.token_urlsafe(24), "labels": json.dumps([*labels]),
                          "judges": str(judges), "id": secrets.token_hex(8)}  # fmt: skip
                made._db.executemany("INSERT INTO meta VALUES (?, ?)", values.items())
                made._db.execute(f"PRAGMA application_id = {APPLICATION}")
                made._db.execute(f"PRAGMA user_version = {FORMAT}")
                made._note("", "made", None, values | {"token": ""}, None)
        if (held := made.meta("source")) != source:
            made.close()
            raise InputError(f"{path} holds a review of {held}, not of {source}: name another database with --db")
        return made

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def meta(self, name: str) -> str:
        with self._lock:
            found = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return str(found[0])

    @property
    def labels(self) -> list[str]:
        return [str(label) for label in json.loads(self.meta("labels"))]

    def settle(self, labels: Sequence[str] | None, judges: int | None) -> None:
        """Other labels, or another number of people an item, from now on. Raises InputError where a label that is to go was
        given already."""
        with self._change():
            for name, value in (("labels", None if labels is None else json.dumps([*labels])), ("judges", judges)):
                if value is None or str(value) == self.meta(name):
                    continue
                if name == "labels":
                    used = self._db.execute("SELECT DISTINCT label FROM judgements WHERE label NOT NULL").fetchall()
                    if gone := sorted({row[0] for row in used} - {*(labels or ())}):
                        raise InputError(
                            f"--labels leaves out {gone[0]!r}, which was given already; keep it in the list"
                        )
                self._db.execute("UPDATE meta SET value = ? WHERE name = ?", (str(value), name))
                self._note("", "settled", None, {name: value}, None)

    def add(self, items: Iterable[Item]) -> int:
        """Put items into the queue; those that are there stay. Returns how many are new."""
        with self._change():
            new = 0
            for one in ordered(items):
                made = self._db.execute(
                    "INSERT OR IGNORE INTO items (key, unsure, data) VALUES (?, ?, ?)",
                    (one.key, one.unsure, json.dumps(one.data)),
                )
                new += made.rowcount
            if new:
                self._note("", "added", None, {"items": new}, None)
            return new

    # ------------------------------------------------------------------------------------------------------- the queue

    def next(self, reviewer: str, window: str, have: Sequence[int] = (), count: int = 1) -> list[dict[str, Any]]:
        """Items for a person: the least sure that they have not judged, lent to this window from now on. `have` are those that
        the window holds already; they stay lent."""
        now = time.time()
        with self._change():
            self._db.execute("DELETE FROM lent WHERE until <= ?", (now,))
            self._db.executemany(
                'UPDATE lent SET until = ? WHERE item = ? AND reviewer = ? AND "window" = ?',
                [(now + LENT, item, reviewer, window) for item in have],
            )
            asked = {"reviewer": reviewer, "window": window, "now": now, "judges": int(self.meta("judges")),
                     "have": json.dumps([*have]), "count": count}  # fmt: skip
            found = self._db.execute(_NEXT, asked).fetchall()
            self._lend([item for item, _ in found], reviewer, window, now)
            return [self._shown(item, data) for item, data in found]

    def judge(self, reviewer: str, request: str, item: int, said: Judgement) -> None:
        """Keep what a person says of an item. The same request again changes nothing.

        Raises InputError for what cannot be said of the item, and Conflict where the person has judged it already.
        """
        with self._change():
            if self._known(request):
                return
            data = self._data(item)
            self._check(data, said)
            old = self._db.execute(
                "SELECT 1 FROM judgements WHERE item = ? AND reviewer = ?", (item, reviewer)
            ).fetchone()
            self._note(reviewer, "refused" if old else "judged", item, asdict(said), request)
            if not old:
                self._db.execute(
                    "INSERT INTO judgements (item, reviewer, label, thumb, better, at) VALUES (?, ?, ?, ?, ?, ?)",
                    (item, reviewer, said.label, said.thumb, said.better, time.time()),
                )
                self._db.execute("DELETE FROM lent WHERE item = ? AND reviewer = ?", (item, reviewer))
        if old:
            raise Conflict(f"{reviewer} has judged this one already, in another window; the first judgement stays")

    def undo(self, reviewer: str, window: str, request: str, item: int | None = None) -> dict[str, Any] | None:
        """Take back what a person said of an item, or last; it is lent to them again. Returns the item with what was said of
        it; None where there is nothing to take back."""
        with self._change():
            where = "reviewer = ? AND item = ?" if item is not None else "reviewer = ?"
            values = (reviewer,) if item is None else (reviewer, item)
            row = None
            if not self._known(request):
                row = self._db.execute(
                    f"SELECT number, item, label, thumb, better FROM judgements WHERE {where} ORDER BY number DESC",
                    values,
                ).fetchone()
            if row is None:
                return None
            said = Judgement(*row[2:])
            self._db.execute("DELETE FROM judgements WHERE number = ?", row[:1])
            self._note(reviewer, "undone", row[1], asdict(said), request)
            self._lend([row[1]], reviewer, window, time.time())
            return self._shown(row[1], json.dumps(self._data(row[1]))) | {"said": asdict(said)}

    def progress(self, reviewer: str = "") -> dict[str, Any]:
        """Counts: items, judgements, items judged by anyone, by this person, and of each person."""
        with self._lock:
            one = lambda sql, *values: int(self._db.execute(sql, values).fetchone()[0])
            people = self._db.execute("SELECT reviewer, count(*) FROM judgements GROUP BY reviewer ORDER BY 2 DESC, 1")
            return {
                "items": one("SELECT count(*) FROM items"),
                "judgements": one("SELECT count(*) FROM judgements"),
                "judged": one("SELECT count(DISTINCT item) FROM judgements"),
                "mine": one("SELECT count(*) FROM judgements WHERE reviewer = ?", reviewer),
                "reviewers": [{"name": name, "count": count} for name, count in people],
            }

    # ------------------------------------------------------------------------------------------------- what comes of it

    def judged(self) -> Iterator[tuple[dict[str, Any], list[tuple[str, Judgement]]]]:
        """The data of each item in the order of their making, with who said what of it."""
        with self._lock:
            items = self._db.execute("SELECT id, data FROM items ORDER BY id").fetchall()
            said: dict[int, list[tuple[str, Judgement]]] = {}
            rows = self._db.execute("SELECT item, reviewer, label, thumb, better FROM judgements ORDER BY number")
            for item, reviewer, *values in rows:
                said.setdefault(item, []).append((reviewer, Judgement(*values)))
        for item, data in items:
            yield json.loads(data), said.get(item, [])

    def audit(self) -> list[tuple[Any, ...]]:
        """(number, time, reviewer, action, item, what was said in JSON, request) of all that happened, the oldest first."""
        with self._lock:
            return self._db.execute("SELECT * FROM audit ORDER BY number").fetchall()

    # ------------------------------------------------------------------------------------------------------------ parts

    @contextmanager
    def _change(self) -> Iterator[None]:
        """One transaction: all of it or nothing. Raises InputError where the disk or another program refuses it."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield
                except BaseException:
                    if self._db.in_transaction:  # a full disk rolls back by itself
                        self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise InputError(f"cannot write {self.path}: {error}") from error

    def _note(self, reviewer: str, action: str, item: int | None, said: Any, request: str | None) -> None:
        self._db.execute(
            "INSERT INTO audit (at, reviewer, action, item, said, request) VALUES (?, ?, ?, ?, ?, ?)",
            (time.time(), reviewer, action, item, json.dumps(said), request),
        )

    def _known(self, request: str) -> bool:
        return self._db.execute("SELECT 1 FROM audit WHERE request = ?", (request,)).fetchone() is not None

    def _data(self, item: int) -> dict[str, Any]:
        found = self._db.execute("SELECT data FROM items WHERE id = ?", (item,)).fetchone()
        if found is None:
            raise InputError(f"there is no item {item}")
        return dict(json.loads(found[0]))

    def _lend(self, items: Sequence[int], reviewer: str, window: str, now: float) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO lent VALUES (?, ?, ?, ?)", [(i, reviewer, window, now + LENT) for i in items]
        )

    def _check(self, data: dict[str, Any], said: Judgement) -> None:
        if said.label is not None and said.label not in self.labels:
            raise InputError(f"{said.label!r} is none of the labels {', '.join(self.labels)}")
        if said.thumb not in (-1, 0, 1):
            raise InputError(f"a thumb is 1, 0 or -1; it is {said.thumb!r}")
        if said.better is None:
            return
        if not said.better.strip():
            raise InputError("the better answer is empty")
        if len(said.better) > LONGEST:
            raise InputError(f"the better answer must have at most {LONGEST:,} characters; it has {len(said.better):,}")
        if said.better.strip() == Item(data).text.strip():
            raise InputError("the better answer is the answer that is there, so the pair would prefer nothing")

    @staticmethod
    def _shown(item: int, data: str) -> dict[str, Any]:
        one = Item(json.loads(data))
        return {"id": item, "prompt": one.prompt, "text": one.text}


def is_store(path: Path) -> bool:
    """Whether a file is a database of SQLite."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _connect(path: Path, new: bool = False) -> sqlite3.Connection:
    """An open connection in WAL mode. Raises InputError for what is no database of ours."""
    try:
        db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            application, version, tables = (
                db.execute(sql).fetchone()[0]
                for sql in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
            )
            if not (new and not tables and not application):
                if application != APPLICATION:
                    raise InputError(f"{path} is no database of fastlm review")
                if version != FORMAT:
                    raise InputError(
                        f"{path} is of another version: its format is {version}, and this one reads {FORMAT}; the fastlm that "
                        f"made it reads it"
                    )
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
        except BaseException:
            db.close()
            raise
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path} cannot be opened as a database of fastlm review: {error}") from None
    return db
