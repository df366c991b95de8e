"""Opens what a run made: the trained graph, its base, the merged model and the GGUF, each under a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.errors import ConfigError, ModelError
from finetune.serve.config import KINDS, MIB, ServeConfig

if TYPE_CHECKING:
    from finetune.serve.adapters import AdapterLoader
    from finetune.serve.engine import Engine

SLOTS = 4
"""Answers that llama.cpp generates at the same time: a choice. Each keeps memory for its longest text; others wait in
its queue."""

LLAMA_CONTEXT = 4096
"""Tokens of each of them."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """Models that are ready to answer.

    Attributes:
        engines: The first model of the first one is the run's own.
        adapters: Loads more adapters of the base; None where no adapter is served.
    """

    engines: list[Engine]
    adapters: AdapterLoader | None

    def close(self) -> None:
        """Frees all models."""
        for engine in self.engines:
            engine.close()


@dataclass(frozen=True, kw_only=True)
class Artifacts:
    """What there is to serve.

    Attributes:
        name: Of the run or file.
        adapter: Folder of the exported adapter; None where there is none.
        merged: Folder of the exported merged model.
        gguf: The GGUF file.
        base: Folder of the adapter's base, where it is neither on the hub nor where the run found it.
    """

    name: str
    adapter: Path | None = None
    merged: Path | None = None
    gguf: Path | None = None
    base: Path | None = None

    def kinds(self) -> list[str]:
        """Returns what can be served."""
        has = {"adapter": self.adapter, "base": self.adapter, "merged": self.merged, "gguf": self.gguf}
        return [kind for kind in KINDS if has[kind]]


def find_artifacts(target: Path, *, base: Path | None = None) -> Artifacts:
    """Finds what a run's folder, one of its exports, or a GGUF file has to serve; loads nothing.

    Args:
        target: The folder or file.
        base: Folder of the base, where it is neither on the hub nor where the run found it.

    Raises:
        ConfigError: It does not exist, or is a run that has not exported anything yet.
    """
    if target.suffix == ".gguf":
        if not target.is_file():
            raise ConfigError(f"{target} does not exist; give the path of a .gguf file")
        return Artifacts(name=target.stem if target.stem != "model" else target.parent.name, gguf=target)
    if not target.is_dir():
        raise ConfigError(f"{target} holds no run; name a run that exists, one of its exports, or a .gguf file")
    kind = _kind(target)
    exports = target if (target / "manifest.json").is_file() else target / "export"
    folders = sorted(folder for folder in exports.iterdir() if folder.is_dir()) if exports.is_dir() else []
    files = [folder / "model.gguf" for folder in (target, *folders) if (folder / "model.gguf").is_file()]
    found = Artifacts(
        name=target.name,
        adapter=target if kind == "adapter" else next((path for path in folders if _kind(path) == "adapter"), None),
        merged=target if kind == "merged" else next((path for path in folders if _kind(path) == "merged"), None),
        gguf=next(iter(files), None),
        base=base,
    )
    if not found.kinds():
        raise ConfigError(f"{target} {_why_empty(target, exports)}")
    return found


def _why_empty(target: Path, exports: Path) -> str:
    if (target / "config.yaml").is_file() and not (exports / "manifest.json").is_file():
        done = sorted(target.glob("*/manifest.json"), key=lambda file: file.stat().st_mtime)
        names = ", ".join(file.parent.name for file in done) or "nothing"
        return f"is an unfinished run, which has no exports (done: {names}); continue it with run.if_exists=resume"
    return (
        "holds nothing to serve; export adapter, safetensors or gguf_q8_0, e.g. `finetune export run.name=x "
        "export=[adapter]`"
    )


def _kind(folder: Path) -> str | None:
    """Returns ``adapter`` or ``merged`` where the folder is such an export."""
    import json

    file = folder / "finetune.json"
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["kind"])
    except (ValueError, KeyError) as error:
        raise ModelError(f"{file} is damaged ({error!r}); export again") from error


def choose_kinds(artifacts: Artifacts, wanted: Sequence[str]) -> list[str]:
    """Returns the kinds to serve: those wanted, or else the adapter and its base, or what else there is first.

    Raises:
        ConfigError: A wanted one does not exist.
    """
    kinds = artifacts.kinds()
    missing = [kind for kind in wanted if kind not in kinds]
    if missing:
        raise ConfigError(
            f"--models {','.join(missing)}: {artifacts.name} has {', '.join(kinds)}; "
            "export=[adapter,safetensors,gguf_q8_0] makes all of them"
        )
    return list(wanted) or (["adapter", "base"] if "adapter" in kinds else kinds[:1])


def open_models(artifacts: Artifacts, kinds: Sequence[str], config: ServeConfig) -> Opened:
    """Loads the models, after their hashes were checked.

    The adapter is called by the name of its run, the others ``base``, ``merged`` and ``gguf``; a model that is served
    alone has the name of its folder or file.

    Raises:
        ModelError: A file has changed, or a model cannot be loaded or batched.
    """
    engines: list[Engine] = []
    loader = None
    if {"adapter", "base", "merged"} & set(kinds):
        open_engine = _open_vllm if config.engine == "vllm" else _open_transformers
        engine, loader = open_engine(artifacts, kinds, config)
        engines.append(engine)
    if "gguf" in kinds:
        engines.append(_open_gguf(artifacts, alone=len(kinds) == 1, config=config))
    return Opened(engines=engines, adapters=loader)


def _open_vllm(artifacts: Artifacts, kinds: Sequence[str], config: ServeConfig) -> tuple[Engine, AdapterLoader | None]:
    from finetune.serve.vllm_models import open_vllm

    return open_vllm(artifacts, kinds, config)


def _open_transformers(
    artifacts: Artifacts, kinds: Sequence[str], config: ServeConfig
) -> tuple[Engine, AdapterLoader | None]:
    from finetune.console import quiet_libraries
    from finetune.export.loader import chat_of, check, rebuild
    from finetune.serve.adapters import AdapterLoader, GraphAdapters
    from finetune.serve.graphs import ServedModel
    from finetune.serve.transformers_engine import TransformersEngine

    quiet_libraries()
    models: list[ServedModel] = []
    chats = []
    graph: Any = None
    record: dict[str, Any] = {}
    for folder, wanted in ((artifacts.adapter, {"adapter", "base"}), (artifacts.merged, {"merged"})):
        if folder is None or not wanted & set(kinds):
            continue
        folder, record_of = check(folder)
        log("serve", f"hashes of {folder} are those of the export")
        loaded, tokenizer = rebuild(folder, record_of, base=artifacts.base)
        chats.append(chat_of(tokenizer, record_of))
        if "merged" in wanted:
            models.append(ServedModel(name=served_name(artifacts, "merged", kinds), graph=loaded, adapter=None))
            continue
        graph, record = loaded, record_of
        models += [
            ServedModel(
                name=served_name(artifacts, kind, kinds), graph=loaded, adapter="default" if kind == "adapter" else None
            )
            for kind in ("adapter", "base")
            if kind in kinds
        ]
    engine = TransformersEngine(chats[0], models, concurrent=config.concurrent, cache_bytes=config.cache_mib * MIB)
    loader = None
    if graph is not None and config.adapters is not None:
        loader = AdapterLoader(GraphAdapters(engine, graph), record, root=config.adapters)
    return engine, loader


def _open_gguf(artifacts: Artifacts, *, alone: bool, config: ServeConfig) -> Engine:
    from finetune.export.loader import chat_of, check, check_gguf, load_tokenizer
    from finetune.hardware import probe
    from finetune.serve.llama_engine import LlamaEngine

    assert artifacts.gguf is not None
    known = check_gguf(artifacts.gguf)
    log("serve", f"{artifacts.gguf} {'has the hash of the export' if known else 'has no recorded hash'}")
    source, chat = artifacts.adapter or artifacts.merged, None
    if source is not None:
        folder, record = check(source)
        chat = chat_of(load_tokenizer(folder, record), record)
    return LlamaEngine(
        artifacts.gguf,
        name=artifacts.name if alone else "gguf",
        chat=chat,
        concurrent=min(SLOTS, config.concurrent),
        context_tokens=LLAMA_CONTEXT,
        threads=probe().cores,
    )


def served_name(artifacts: Artifacts, kind: str, kinds: Sequence[str]) -> str:
    """Returns what a request calls a model."""
    if kind == "adapter" or len(kinds) == 1:
        return artifacts.name if artifacts.name not in KINDS or kind == artifacts.name else kind
    return kind
