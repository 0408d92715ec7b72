"""A port for a test's own server."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A free one below those that a kernel hands out, so that no other process is given it before its user binds it."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(20000, 32768)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
