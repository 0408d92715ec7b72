"""Other packages that compute what fastlm computes: what is installed, which ops it is held beside, and why it is missing.

``pip install "fastlm[bench-peers]"`` brings those that build anywhere; flash-attn and xformers need a GPU's toolchain.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

from fastlm.bench.harness import Missing

# Distribution: (module, what it is held beside here)
PEERS = {
    "liger-kernel": ("liger_kernel", "dropout_add_norm: its norms after PyTorch's dropout and add"),
    "flash-attn": ("flash_attn", "attention"),
    "xformers": ("xformers", "attention"),
    "bitsandbytes": ("bitsandbytes", "nothing yet: its 8-bit linear is for a GPU"),
    "torchao": ("torchao", "int8_matmul: its compiled linear with dynamic int8 activations"),
}


def load(distribution: str, module: str) -> ModuleType:
    """``module`` of an installed peer. Raises Missing, with the reason in one sentence, if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if installed(distribution) is None:
            raise Missing(f"{distribution} is not installed (pip install {distribution})") from error
        raise Missing(f"{distribution} {installed(distribution)} cannot be imported: {error}") from error


def installed(distribution: str) -> str | None:
    """The version of a peer, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def table() -> dict[str, str]:
    """Each peer with its version or that it is missing, and what it is held beside: part of every result file."""
    return {
        name: f"{installed(name) or 'not installed'}; beside {beside}" for name, (_, beside) in sorted(PEERS.items())
    }
