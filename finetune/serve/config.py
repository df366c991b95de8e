"""Where the server listens, who may ask, and how much."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = ("adapter", "base", "merged", "gguf")

ENGINES = ("transformers", "vllm")
"""Of adapter, base and merged; a GGUF is answered by llama.cpp."""

MIB = 1024**2


@dataclass(kw_only=True, slots=True)
class ServeConfig:
    """Configures the server."""

    engine: str = "transformers"
    """What computes adapter, base and merged: one of `ENGINES`."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs a key."""

    port: int = 8000
    """0 lets the system choose."""

    api_key: str = ""
    """What a client sends as ``Authorization: Bearer KEY``. Empty: none is needed."""

    max_body_mib: int = 4
    """Largest request body."""

    max_prompt_tokens: int | None = None
    """Longest prompt; None for the model's own limit."""

    max_output_tokens: int = 1024
    """Longest answer, and the limit of a request that gives none."""

    concurrent: int = 32
    """Answers that are generated at the same time."""

    waiting: int = 128
    """Answers that wait before further requests are refused with status 429."""

    request_seconds: float = 600.0
    """Time of one request, waiting included."""

    drain_seconds: float = 60.0
    """Time for running answers after SIGTERM."""

    cache_mib: int = 4096
    """Bound of the key-value caches."""

    adapters: Path | None = None
    """Folder below which clients may load adapters; None: they may not."""

    log_text: bool = False
    """Whether prompts and answers are logged."""

    def problems(self) -> Iterator[str]:
        """Yields one sentence for each setting that is not allowed."""
        if not 0 <= self.port <= 65535:
            yield f"serve --port must be between 0 and 65535; got {self.port}"
        if not self.api_key and not is_loopback(self.host):
            yield (
                f"serve --host {self.host} is reachable from other machines, so a key is required; "
                "give --api-key, or set FINETUNE_API_KEY in the environment"
            )
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable() and " " not in self.api_key):
            yield "serve --api-key must be printable ASCII without spaces, since it is sent in a header"
        if self.adapters is not None and not self.adapters.is_dir():
            yield f"serve --adapters {self.adapters}: there is no such folder"


def is_loopback(host: str) -> bool:
    """Returns whether an address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
