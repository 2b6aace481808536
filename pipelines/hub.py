"""The Hugging Face hub, reached or known to be out of reach within seconds.

Left alone, the hub's clients retry for most of a minute, noisily, for every file.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

_CONNECT_SECONDS = 3

# Weights in other formats than safetensors are never loaded; some repositories hold them twice more.
NEVER_LOADED = (
    *("*.bin", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "original/*", "consolidated*"),
    *("*.md", ".*"),
)


@cache
def check_reachable(address: str) -> None:
    """Try to connect to a server, where clients would try for minutes; OSError where it cannot be reached."""
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_SECONDS):
        pass


@cache
def prepare_hub() -> None:
    """Before anything from the hub: where it cannot be reached, use cached files only, and say so once.

    `HF_HUB_OFFLINE=1` has the same effect without the attempt. Behind a proxy nothing is attempted.
    """
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE or getproxies():
        return
    try:
        check_reachable(hub.ENDPOINT)
    except OSError as error:
        print(f"warning: {hub.ENDPOINT} cannot be reached ({error}); using cached files only", file=sys.stderr)
        hub.HF_HUB_OFFLINE = True


def what_to_do() -> str:
    """What a user can do where something of the hub cannot be had."""
    fetch = "fetch it where there is one: python -m pipelines.prefetch with the same model= and task="
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return f"HF_HUB_OFFLINE is set and it is not in the cache: unset it, or without a connection {fetch}"
    return f"check the connection and the name, or {fetch}"


def commit_of(path: str | None) -> str | None:
    """The commit that a file of the hub's caches belongs to, which is a folder's name; None where there is none."""
    return next((part for part in Path(path or "").parts if re.fullmatch("[0-9a-f]{40}", part)), None)
