"""Checkpoints: one atomic folder each, every file hashed in a manifest that loading checks.

    RUN/checkpoints/step-00001000/   model.safetensors  optimizer.safetensors  random.safetensors  state.json  manifest.json

A save copies tensors aside, and a thread writes them into a hidden folder, syncs files and folder, and renames: a folder
that has its name is whole, and an earlier one is never touched before a later one stands. Tensors carry the plain model's
names, whatever is wrapped around it. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.data.errors import InputError

DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(InputError):
    """A checkpoint cannot be written or read."""


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems refuse to sync a folder; the files are synced
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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

    return load_file(str(path))


def write_folder(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, Any]) -> None:
    """Write a checkpoint folder atomically. Raises CheckpointError; what stood before stands then still."""
    draft = folder.parent / f".draft-{folder.name}-{os.getpid()}"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        manifest = {}
        for name, group in tensors.items():
            with _Hashed(draft / name) as file:
                write_safetensors(file, group)
            manifest[name] = {"size": file.size, "sha256": file.hash.hexdigest()}
        for name, content in texts.items():
            with _Hashed(draft / name) as file:
                file.write(json.dumps(content, indent=1).encode())
            manifest[name] = {"size": file.size, "sha256": file.hash.hexdigest()}
        with _Hashed(draft / "manifest.json") as file:
            body = json.dumps(manifest, indent=1, sort_keys=True)
            file.write((body + "\n" + hashlib.sha256(body.encode()).hexdigest() + "\n").encode())
        _sync_folder(draft)
        if folder.exists():  # the same step saved again after a resume
            shutil.rmtree(folder)
        os.rename(draft, folder)
        _sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the checkpoint {folder}: {error.strerror}; earlier checkpoints are untouched"
        ) from error


def verify(folder: Path) -> None:
    """Check every file against the manifest; CheckpointError names the first that differs."""
    try:
        text = (folder / "manifest.json").read_text()
        body, known = text.rstrip("\n").rsplit("\n", 1)
        if hashlib.sha256(body.encode()).hexdigest() != known:
            raise ValueError
        manifest = json.loads(body)
    except (OSError, ValueError):
        raise CheckpointError(f"the checkpoint {folder} is damaged: manifest.json is missing or altered") from None
    for name, entry in manifest.items():
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


def newest(run: Path, complain: Any = print) -> Path:
    """The latest checkpoint of a run that is whole; damaged ones are named to `complain` and passed over."""
    damaged = None
    for _, folder in reversed(steps(run)):
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            damaged = error
            complain(f"{error}; trying the one before")
    if damaged is not None:
        raise CheckpointError(f"no checkpoint of {run} is whole; the last problem: {damaged}")
    raise CheckpointError(f"{run} holds no checkpoint")


class Saver:
    """Writes checkpoints of a run in a thread and keeps the last few, the best, and every n-th."""

    def __init__(self, run: Path, keep: int, keep_every: int = 0) -> None:
        self.run, self.keep, self.keep_every = run, keep, keep_every
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._held: dict[str, dict[str, Tensor]] = {}

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], best: bool = False
    ) -> None:
        """Copy the tensors aside and write them behind the caller's back; an earlier save is waited for first."""
        self.wait()
        copies = {file: self._copy(file, group) for file, group in tensors.items()}
        text = json.loads(json.dumps(state))
        self._thread = threading.Thread(target=self._write, args=(step, copies, text, best), name="fastlm-save")
        self._thread.start()

    def _copy(self, file: str, group: Mapping[str, Tensor]) -> dict[str, Tensor]:
        held, out = self._held.get(file, {}), {}
        for name, t in group.items():
            own = held.get(name)  # the last save's copy is free again: its pages need no second fault
            if own is None or own.shape != t.shape or own.dtype != t.dtype:
                own = torch.empty(t.shape, dtype=t.dtype)
            out[name] = own.copy_(t.detach())
        self._held[file] = out
        return out

    def _write(self, step: int, tensors: Any, state: Any, best: bool) -> None:
        try:
            folder = self.run / "checkpoints" / f"step-{step:08d}"
            write_folder(folder, tensors, {"state.json": state})
            if best:
                self._link_best(folder, step)
            self._prune()
        except BaseException as error:  # noqa: BLE001  raised again by wait()
            self._error = error

    def _link_best(self, folder: Path, step: int) -> None:
        """best-STEP shares the files of step-STEP by hard links, so it costs no space until that one goes."""
        draft = folder.parent / f".draft-best-{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            try:
                shutil.copytree(folder, draft, copy_function=os.link)
            except (OSError, shutil.Error):
                shutil.rmtree(draft, ignore_errors=True)
                shutil.copytree(folder, draft)
            target = folder.parent / f"best-{step:08d}"
            shutil.rmtree(target, ignore_errors=True)
            os.rename(draft, target)
        except (OSError, shutil.Error) as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise CheckpointError(f"cannot keep the best checkpoint of {self.run}: {error}") from error
        for other, path in steps(self.run, "best"):
            if other != step:
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        for step, path in steps(self.run)[: -self.keep]:
            if not (self.keep_every and step % self.keep_every == 0):
                shutil.rmtree(path, ignore_errors=True)

    def wait(self) -> None:
        """Until the last save is on disk; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def clean(run: Path) -> None:
    """Remove what a killed save left behind."""
    for path in (run / "checkpoints").glob(".draft-*"):
        shutil.rmtree(path, ignore_errors=True)
