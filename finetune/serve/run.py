"""Runs the server until a signal ends it."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.errors import ConfigError
from finetune.serve.artifacts import choose_kinds, find_artifacts, open_models
from finetune.serve.config import ServeConfig
from finetune.serve.vllm_process import missing_vllm

if TYPE_CHECKING:
    import uvicorn

    from finetune.serve.service import Service

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
POLL_SECONDS = 0.05
CLOSE_SECONDS = 2
"""Time for the last bytes of answers, after `drain`."""


def serve(target: Path, config: ServeConfig, *, models: Sequence[str] = (), base: Path | None = None) -> None:
    """Serves a run, one of its exports or a GGUF file until SIGTERM or SIGINT, and drains then.

    Args:
        target: The folder or file.
        config: Address, key and limits.
        models: Of ``adapter``, ``base``, ``merged`` and ``gguf``; empty for the adapter and its base.
        base: Folder of the base, where it is neither on the hub nor where the run found it.

    Raises:
        ConfigError: A setting, a missing package, a taken port, or nothing to serve.
        ModelError: A file has changed, or a model cannot be loaded or batched.
    """
    problems = [*config.problems(), *missing_packages(), *(missing_vllm() if config.engine == "vllm" else [])]
    if problems:
        raise ConfigError(*problems)
    artifacts = find_artifacts(target, base=base)
    kinds = choose_kinds(artifacts, models)
    with _listening(config) as listener:
        opened = open_models(artifacts, kinds, config)
        try:
            from finetune.serve.app import build_app
            from finetune.serve.page import add_page, read_samples
            from finetune.serve.service import Service

            service = Service(opened.engines, config)
            app = build_app(service, opened.adapters)
            add_page(app, read_samples(target))
            asyncio.run(_run(make_server(app), service, listener))
        finally:
            opened.close()
    log("serve", "ended")


def missing_packages() -> list[str]:
    """Returns a sentence where packages of the server are not installed."""
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    return [f"serve needs {' and '.join(missing)}; run: pip install 'finetune-qlora[serve]'"] if missing else []


def make_server(app: Any) -> uvicorn.Server:
    """Returns a server that writes no log of its own and leaves signals to `serve`."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=CLOSE_SECONDS
    )
    return Server(config)


@contextmanager
def _listening(config: ServeConfig) -> Iterator[socket.socket]:
    """Takes the port before the model is loaded, which may take minutes."""
    try:
        address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(address[0], socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"serve --host {config.host}: {error.strerror}; give an address of this machine") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address[4])
        except OSError as error:
            raise ConfigError(
                f"serve --port {config.port}: {config.host} port {config.port} cannot be used: {error.strerror}; "
                "choose another --port, or 0 for any"
            ) from error
        yield listener


async def _run(server: uvicorn.Server, service: Service, listener: socket.socket) -> None:
    """Serves until a signal, then refuses new requests and waits for the running ones. A second signal ends at once."""
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(_end, server, service, ending)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stopped = asyncio.create_task(ending.wait())
        while not (server.started or serving.done()):
            await asyncio.sleep(POLL_SECONDS)
        log("serve", f"{', '.join(service.names())} at {_address(listener)}/v1; {_protection(service.config)}")
        log("serve", f"a page to compare them: {_address(listener)}/")
        await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await drain(service)
            server.should_exit = True
        stopped.cancel()
        await serving
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _protection(config: ServeConfig) -> str:
    return "a key is required" if config.api_key else "no key is required, on this machine only"


def _end(server: uvicorn.Server, service: Service, ending: asyncio.Event) -> None:
    if ending.is_set():
        server.should_exit = server.force_exit = True
        return
    log("serve", f"no new requests; {service.open} running answers are finished; a second signal ends at once")
    service.draining = True
    ending.set()


async def drain(service: Service) -> None:
    """Waits until no answer is open, or for the time that the configuration allows."""
    try:
        async with asyncio.timeout(service.config.drain_seconds):
            while service.open:
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        log(
            "serve",
            f"{service.open} answers were still running after {service.config.drain_seconds:g} s and are stopped",
        )
