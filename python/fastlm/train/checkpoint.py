"""Checkpoints: one atomic folder each, every file hashed in a manifest that loading checks.

    RUN/checkpoints/step-00001000/   model.safetensors  optimizer.safetensors  random.safetensors  state.json  manifest.json

A save copies tensors aside, and a thread writes them into a hidden folder, syncs files and folder, and renames: a folder
that has its name is whole, until it is renamed again to be removed, and an earlier one is never touched before a later one
stands. Tensors carry the plain model's names, whatever is wrapped around it. Nothing is pickled.

Of several ranks each writes what it alone holds into files of its own (model.rank-00001.safetensors) in that hidden folder;
the header says of each tensor which box of the whole it is. When every rank's files are synced, rank 0 writes the manifest
over all of them and renames. `Stored` reads any box back, out of the files that hold parts of it, so any mesh reads what any
other wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, KeysView, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.console import warn
from fastlm.data.errors import InputError
from fastlm.train.files import sync_folder, utf8
from fastlm.train.pieces import Groups, Piece, plain_name
from fastlm.train.ranks import Ranks, SingleProcess

# all that safetensors has a name for; its Python package has other types' names from PyTorch's, where they are there
DTYPES = {
    getattr(torch, name): label
    for name, label in (
        ("float64", "F64"),
        ("float32", "F32"),
        ("float16", "F16"),
        ("bfloat16", "BF16"),
        ("float8_e4m3fn", "F8_E4M3"),
        ("float8_e5m2", "F8_E5M2"),
        ("float8_e8m0fnu", "F8_E8M0"),
        ("complex64", "C64"),
        ("int64", "I64"),
        ("int32", "I32"),
        ("int16", "I16"),
        ("int8", "I8"),
        ("uint64", "U64"),
        ("uint32", "U32"),
        ("uint16", "U16"),
        ("uint8", "U8"),
        ("bool", "BOOL"),
    )
    if hasattr(torch, name)
}


class CheckpointError(InputError):
    """A checkpoint cannot be written or read."""


class _Hashed:
    """A file written, hashed and synced."""

    def __init__(self, path: Path) -> None:
        self.path, self.hash, self.size = path, hashlib.sha256(), 0
        self.file = open(path, "wb")  # noqa: SIM115

    def write(self, data: Any) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)

    def __enter__(self) -> _Hashed:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                self.file.flush()
                os.fsync(self.file.fileno())
        finally:
            self.file.close()


def write_safetensors(file: Any, tensors: Mapping[str, Tensor], meta: Mapping[str, str] | None = None) -> None:
    """The safetensors format written straight from the tensors' memory: length, JSON header, data."""
    header: dict[str, Any] = {"__metadata__": dict(meta)} if meta else {}
    end = 0
    for name, t in tensors.items():
        if t.dtype not in DTYPES:
            raise CheckpointError(f"{name} is of {t.dtype}, which safetensors cannot hold")
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw = raw.ljust(-(-len(raw) // 8) * 8)
    file.write(len(raw).to_bytes(8, "little"))
    file.write(raw)
    for t in tensors.values():
        if t.numel():
            file.write(memoryview(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with _in_utf8(path) as name:
        return load_file(name)


@contextlib.contextmanager
def _in_utf8(path: Path) -> Iterator[str]:
    """A name that leads to an existing file; the package safetensors takes none that is not UTF-8."""
    if utf8(path):
        yield str(path)
        return
    with open(path, "rb") as file:
        yield f"/dev/fd/{file.fileno()}"


class Stored:
    """The tensors of one kind in a folder, whichever ranks' files hold their parts: shapes, and any box of them.

    Raises CheckpointError when there is no such file, or the parts do not make a whole.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder, self.kind = folder, kind
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[tuple[Any, str, tuple[int, ...], tuple[int, ...]]]] = {}
        # by the manifest alone: a file that a system or another save left there is no rank's
        paths = [folder / name for name in sorted(read_manifest(folder)) if name.partition(".")[0] == kind]
        if not paths:
            raise CheckpointError(f"{folder} holds no {kind}.safetensors")
        for path in paths:
            try:
                with _in_utf8(path) as name:
                    file = safe_open(name, framework="pt")
                boxes = json.loads((file.metadata() or {}).get("boxes", "{}"))
            except (OSError, SafetensorError, ValueError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
            for key in file.keys():  # noqa: SIM118  (no mapping)
                size = tuple(file.get_slice(key).get_shape())
                shape, offset = map(tuple, boxes.get(key, (size, (0,) * len(size))))
                self._shapes[plain_name(key)] = shape
                self._parts.setdefault(plain_name(key), []).append((file, key, offset, size))
        for name, parts in self._parts.items():
            held = sum(math.prod(size) for *_, size in parts)
            if held != math.prod(self._shapes[name]):
                raise CheckpointError(
                    f"{self}: of {name} only {held} of {math.prod(self._shapes[name])} values are there"
                )

    def __str__(self) -> str:
        return f"{self.folder}/{self.kind}.safetensors"

    def names(self) -> KeysView[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, offset: tuple[int, ...] | None = None, size: tuple[int, ...] | None = None) -> Tensor:
        """The box of `size` at `offset`, or the whole; only the bytes of the box are read."""
        offset = (0,) * len(self._shapes[name]) if offset is None else offset
        size = self._shapes[name] if size is None else size
        out: Tensor | None = None
        for file, key, at, held in self._parts[name]:
            low = tuple(max(a, b) for a, b in zip(at, offset))
            high = tuple(min(a + n, b + m) for a, n, b, m in zip(at, held, offset, size))
            if at == offset and held == size:
                return file.get_tensor(key)
            if any(a >= b for a, b in zip(low, high)):
                continue
            part = file.get_slice(key)[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, at))]
            out = part.new_empty(size) if out is None else out
            out[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset))] = part
        if out is None:  # an empty box
            file, key, _, _ = self._parts[name][0]
            out = file.get_tensor(key).new_empty(size)
        return out

    def load(self) -> dict[str, Tensor]:
        """All of them, whole."""
        return {name: self.read(name) for name in self.names()}


def write_groups(draft: Path, groups: Groups, rank: int, size: int) -> dict[str, Any]:
    """This rank's files into a draft; returns their part of the manifest."""
    manifest = {}
    draft.mkdir(parents=True, exist_ok=True)
    for kind, group in groups.items():
        if not group:
            continue
        name = f"{kind}.safetensors" if size == 1 else f"{kind}.rank-{rank:05d}.safetensors"
        boxes = {n: (p.shape, p.offset) for n, p in group.items() if tuple(p.tensor.shape) != p.shape}
        with _Hashed(draft / name) as file:
            meta = {"boxes": json.dumps(boxes, separators=(",", ":"))} if boxes else None
            write_safetensors(file, {n: p.tensor for n, p in group.items()}, meta)
        manifest[name] = {"size": file.size, "sha256": file.hash.hexdigest()}
    return manifest


def seal(draft: Path, folder: Path, manifest: dict[str, Any], texts: Mapping[str, Any]) -> None:
    """Texts and manifest into a draft that every rank has written, and give it its name."""
    for name, content in texts.items():
        with _Hashed(draft / name) as file:
            file.write(json.dumps(content, indent=1).encode())
        manifest[name] = {"size": file.size, "sha256": file.hash.hexdigest()}
    with _Hashed(draft / "manifest.json") as file:
        body = json.dumps(manifest, indent=1, sort_keys=True)
        file.write((body + "\n" + hashlib.sha256(body.encode()).hexdigest() + "\n").encode())
    sync_folder(draft)
    _name(draft, folder)


def _name(draft: Path, folder: Path) -> None:
    """Give a whole draft its name. One that has it (the same step saved again after a resume) is set aside before."""
    aside = folder.parent / f".draft-old-{folder.name}"
    if folder.exists():
        _empty(aside)
        os.rename(folder, aside)
    os.rename(draft, folder)
    shutil.rmtree(aside, ignore_errors=True)
    sync_folder(folder.parent)


def _empty(place: Path) -> None:
    """Remove a folder, or move it on where something in it stays: NFS keeps a file that another process reads."""
    shutil.rmtree(place, ignore_errors=True)
    number = 1
    while place.exists():
        number += 1
        with contextlib.suppress(OSError):
            os.rename(place, place.with_name(f".draft-gone-{place.name.lstrip('.')}-{number}"))
        if number > 1000:
            raise CheckpointError(f"{place} can neither be removed nor moved")


def _remove(folder: Path) -> None:
    """Take a checkpoint's name away, then its files: a kill on the way leaves no half of one under the name."""
    gone = folder.parent / f".draft-gone-{folder.name}"
    _empty(gone)
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def write_base(folder: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, Any] | None = None) -> None:
    """Whole tensors, and texts as JSON, as a folder that `verify` checks. CheckpointError where it cannot be written."""
    draft = folder.parent / f".draft-{folder.name}"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        manifest = write_groups(draft, {"model": {n: Piece.whole(t) for n, t in tensors.items()}}, 0, 1)
        seal(draft, folder, manifest, texts or {})
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(f"cannot write {folder}: {error.strerror}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """Size and hash of each file that belongs to a checkpoint, by name. CheckpointError where that cannot be told."""
    try:
        text = (folder / "manifest.json").read_text(encoding="utf-8")
        body, known = text.rstrip("\n").rsplit("\n", 1)
        if hashlib.sha256(body.encode()).hexdigest() != known:
            raise ValueError
        manifest: dict[str, Any] = json.loads(body)
    except (OSError, ValueError):
        raise CheckpointError(f"the checkpoint {folder} is damaged: manifest.json is missing or altered") from None
    return manifest


def holds(folder: Path, kind: str) -> bool:
    """Whether a checkpoint has tensors of this kind ("ema" and so on)."""
    return any(name.partition(".")[0] == kind for name in read_manifest(folder))


def verify(folder: Path) -> None:
    """Check every file that the manifest names; CheckpointError names the first that differs. Others are no damage:
    systems leave files behind (.DS_Store, .nfs000..., Thumbs.db), and nothing reads them."""
    for name, entry in read_manifest(folder).items():
        digest = hashlib.sha256()
        try:
            with open(folder / name, "rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        except OSError as error:
            raise CheckpointError(f"the checkpoint {folder} is damaged: {name}: {error.strerror}") from None
        if digest.hexdigest() != entry["sha256"]:
            raise CheckpointError(f"the checkpoint {folder} is damaged: {name} does not match its hash")


def steps(run: Path, prefix: str = "step") -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, oldest first."""
    found = []
    folder = run / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(rf"{prefix}-(\d+)", path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found)


def newest(run: Path, complain: Callable[[str], None] = warn) -> Path:
    """The latest checkpoint of a run that is whole; damaged ones are named to `complain` and passed over, those that a
    training run has removed meanwhile in silence."""
    damaged = None
    for _, folder in reversed(steps(run)):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            if not folder.exists() and len(steps(run)) > 0:
                return newest(run, complain)
            damaged = error
            complain(f"{error}; trying the one before")
    if damaged is not None:
        raise CheckpointError(f"no checkpoint of {run} is whole; the last problem: {damaged}")
    raise CheckpointError(f"{run} holds no checkpoint")


class Saver:
    """Writes checkpoints of a run in a thread and keeps the last few, the best, and every n-th.

    Every rank has one and calls `save` at the same steps; `ranks` is how their threads tell each other how it went.
    """

    def __init__(self, run: Path, keep: int, keep_every: int = 0, ranks: Ranks | None = None) -> None:
        self.run, self.keep, self.keep_every = run, keep, keep_every
        self.ranks = ranks or SingleProcess()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._held: dict[str, dict[str, Piece]] = {}

    def save(self, step: int, groups: Groups, state: Mapping[str, Any], best: bool = False) -> None:
        """Copy the pieces aside and write them behind the caller's back; an earlier save is waited for first."""
        self.wait()
        copies = {kind: self._copy(kind, group) for kind, group in groups.items()}
        text = json.loads(json.dumps(state))
        self._thread = threading.Thread(target=self._write, args=(step, copies, text, best), name="fastlm-save")
        self._thread.start()

    def _copy(self, kind: str, group: Mapping[str, Piece]) -> dict[str, Piece]:
        held, out = self._held.get(kind, {}), {}
        for name, p in group.items():
            own = held[name].tensor if name in held else None  # the last save's copy: its pages need no second fault
            if own is None or own.shape != p.tensor.shape or own.dtype != p.tensor.dtype:
                own = torch.empty(p.tensor.shape, dtype=p.tensor.dtype)
            out[name] = Piece(own.copy_(p.tensor.detach()), p.shape, p.offset)
        self._held[kind] = out
        return out

    def _write(self, step: int, groups: Groups, state: Any, best: bool) -> None:
        folder = self.run / "checkpoints" / f"step-{step:08d}"
        draft = folder.parent / f".draft-{folder.name}"
        try:
            manifest, error = {}, ""
            try:
                manifest = write_groups(draft, groups, self.ranks.rank, self.ranks.size)
            except OSError as problem:
                error = problem.strerror or str(problem)
            except Exception as problem:  # noqa: BLE001  told to the others, who wait for this rank's word
                error = str(problem) if isinstance(problem, InputError) else f"{type(problem).__name__}: {problem}"
            told = self.ranks.gather((manifest, error))
            errors = [text for _, text in told if text]
            if not errors and self.ranks.first:
                try:
                    # the best gets its name first: a step's folder that stands refers to a best one that stands
                    named = folder.parent / f"best-{step:08d}" if best else folder
                    seal(draft, named, {k: v for m, _ in told for k, v in m.items()}, {"state.json": state})
                    if best:
                        self._link(named, folder)
                    self.prune(step, step if best else None)
                except (OSError, CheckpointError) as problem:
                    errors = [(problem.strerror if isinstance(problem, OSError) else "") or str(problem)]
            errors = self.ranks.gather(errors)[0]  # nobody goes on as if saved before the folder has its name
            if errors:
                if self.ranks.first:
                    shutil.rmtree(draft, ignore_errors=True)
                raise CheckpointError(
                    f"cannot write the checkpoint {folder}: {errors[0]}; earlier checkpoints are untouched"
                )
        except BaseException as error:  # noqa: BLE001  raised again by wait()
            self._error = error

    def _link(self, whole: Path, folder: Path) -> None:
        """`folder` shares the files of `whole` by hard links, so it costs no space until that one goes."""
        draft = folder.parent / f".draft-{folder.name}"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            shutil.copytree(whole, draft, copy_function=os.link)
        except (OSError, shutil.Error):  # a file system without hard links
            shutil.rmtree(draft, ignore_errors=True)
            try:
                shutil.copytree(whole, draft)
            except shutil.Error as error:
                raise CheckpointError(f"{whole} cannot be copied: {error}") from error
        _name(draft, folder)

    def prune(self, now: int, best: int | None) -> None:
        """At step `now`: remove the checkpoints that are too old, and where one is known to be the best, those before it.

        What lies ahead is left: a damaged checkpoint must not count among those to keep, and a run that goes on from an
        earlier step writes it again. A run that begins calls it too, for what a killed save had not removed yet."""
        old = [s for s in steps(self.run, "best") if best is not None and s[0] < now and s[0] != best]
        so_far = [s for s in steps(self.run) if s[0] <= now]
        old += [s for s in so_far[: -self.keep] if not (self.keep_every and s[0] % self.keep_every == 0)]
        for _, path in old:
            _remove(path)

    def wait(self) -> None:
        """Until the last save is on disk; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def settle(self, seconds: float | None = None) -> None:
        """At the end of a run that failed: wait, of several ranks for so long at most, and say what went wrong."""
        if self._thread is not None:
            self._thread.join(seconds if self.ranks.size > 1 else None)
        if self._error is not None:
            error, self._error = self._error, None
            warn(str(error))


def recover(run: Path) -> None:
    """A checkpoint that was being replaced by its like when a save was killed gets its name back."""
    for old in (run / "checkpoints").glob(".draft-old-*"):
        place = old.with_name(old.name.removeprefix(".draft-old-"))
        if not place.exists():
            os.rename(old, place)


def clean(run: Path) -> None:
    """Remove what a killed save left behind."""
    recover(run)
    for path in (run / "checkpoints").glob(".draft-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in run.glob(".*.draft"):
        path.unlink(missing_ok=True)
