"""JSON for files of rows and tasks, which any string survives."""

from __future__ import annotations

import json
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    r"""JSON that UTF-8 can encode, with letters as they are; of what holds lone surrogates (bytes that were no UTF-8, in a
    name or a group) all in ASCII, so that it is read back as it was."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text
