"""The command line: `fastlm COMMAND ...`. Each command is a module with `main(argv) -> exit status`, imported when called."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

from fastlm import console

COMMANDS = {
    "train": ("fastlm.cli.train", "train a language model on text"),
    "generate": ("fastlm.cli.generate", "continue a prompt with a trained model"),
    "eval": ("fastlm.cli.evaluate", "loss, perplexity and bits per byte of a trained model on a text"),
    "data": ("fastlm.cli.data", "prepare, show, clean, augment, describe, filter a corpus; tasks and labels"),
    "compress": ("fastlm.cli.compress", "a trained model made smaller: int8"),
    "soup": ("fastlm.cli.soup", "the average of runs' weights as a run"),
    "export": ("fastlm.cli.export", "a trained model as safetensors, or for transformers"),
    "inspect": ("fastlm.cli.inspect", "a look inside a model: loss, attention, logit lens, saliency of a text"),
    "review": ("fastlm.cli.review", "a page on which people judge outputs or tasks: labels, thumbs, better answers"),
    "plan": ("fastlm.cli.plan", "what training takes of each device under every mesh, and which to take"),
    "energy": ("fastlm.cli.energy", "when to run for less carbon or cost: what waiting and pausing would save"),
    "runs": ("fastlm.cli.runs", "runs side by side"),
    "compare": ("fastlm.cli.compare", "runs in one picture, and how they differ"),
    "doctor": ("fastlm.cli.doctor", "what is installed, what runs on what, and why"),
    "bench": ("fastlm.bench.__main__", "benchmarks of the kernels and of a training step"),
}


def usage() -> str:
    lines = [f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items()]
    return "usage: fastlm COMMAND [options]   (fastlm COMMAND --help tells more)\n\n" + "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        import fastlm

        print(fastlm.__version__)
        return 0
    if argv[0] not in COMMANDS:
        console.warn(f"fastlm: there is no command {argv[0]!r}\n{usage()}")
        return 2
    module = COMMANDS[argv[0]][0]
    try:
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fastlm"):
            missing = f"fastlm {argv[0]} is not part of this installation"
        else:
            missing = f"fastlm {argv[0]} needs the package {error.name}: pip install {error.name}"
        console.warn(f"fastlm: {missing}")
        return 1
    from fastlm import _native, backend
    from fastlm.data.errors import InputError

    try:
        backend.forced()
        if _native._C is not None:
            _native._C.cpu_isa()  # FASTLM_CPU_ISA
    except ValueError as error:
        console.warn(f"fastlm: {error}")
        return 2
    try:
        return int(command.main(argv[1:]) or 0)
    except (InputError, backend.BackendError) as error:
        console.warn(f"fastlm {argv[0]}: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        console.warn(f"fastlm {argv[0]}: interrupted")
        return 130
    except OSError as error:  # what the file system refuses, wherever that was
        if (stream := console.refused_by(error)) is not None:
            if not isinstance(error, BrokenPipeError):
                console.warn(f"fastlm {argv[0]}: {stream}: {error.strerror}")
            return 1 if stream == "stdout" else 2  # on stderr a command says what it refuses
        where = f"{error.filename}: " if error.filename else ""
        console.warn(f"fastlm {argv[0]}: {where}{error.strerror or error}")
        return 2


def run() -> NoReturn:
    """The console script: `main`, then the end of the process."""
    console.degrade()
    try:
        code = main()
    except SystemExit as end:  # of --help, and of flags that cannot be read
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    code = console.finish(code)
    mesh = sys.modules.get("fastlm.train.mesh")
    if mesh is not None and mesh.had_peers:
        mesh.leave(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
