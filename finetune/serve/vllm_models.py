"""Opens a run's models in vLLM: the merged model, or an adapter with its base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.console import log
from finetune.errors import ConfigError, ModelError
from finetune.export.loader import chat_of, check, find_base, load_tokenizer
from finetune.serve.adapters import AdapterLoader
from finetune.serve.artifacts import Artifacts, served_name
from finetune.serve.config import ServeConfig
from finetune.serve.vllm_engine import VllmEngine
from finetune.serve.vllm_process import VllmModel, start_vllm

SAME_WEIGHTS = ("none", "prequantized")
"""Methods whose base vLLM reads as it is stored, so that it computes with the weights of the training."""


def open_vllm(
    artifacts: Artifacts, kinds: Sequence[str], config: ServeConfig
) -> tuple[VllmEngine, AdapterLoader | None]:
    """Starts vLLM for the merged model, or for the adapter and its base, after their hashes were checked.

    Raises:
        ConfigError: There is no vLLM, or both are asked for.
        ModelError: A file has changed, vLLM cannot compute what was trained, or it does not start.
    """
    if "merged" in kinds and {"adapter", "base"} & set(kinds):
        raise ConfigError(
            f"--models {','.join(kinds)}: vLLM holds one set of weights; serve merged, or adapter and base, and the "
            "other on a server of its own"
        )
    source = artifacts.merged if "merged" in kinds else artifacts.adapter
    assert source is not None
    from transformers import AutoConfig

    folder, record = check(source)
    if record["model"]["remote_code"]:
        raise ModelError(f"{folder} needs code of its own, which vLLM would run unchecked; leave out --engine vllm")
    log("serve", f"hashes of {folder} are those of the export")
    chat = chat_of(load_tokenizer(folder, record), record)
    names = {kind: served_name(artifacts, kind, kinds) for kind in kinds if kind != "gguf"}
    if "merged" in kinds:
        model = VllmModel(weights=folder, tokenizer=folder, name=names["merged"], dtype=record["computation"]["dtype"])
    else:
        model = _adapted(artifacts, folder, record, names)
    settings = AutoConfig.from_pretrained(model.weights)
    process = start_vllm(model, config)
    try:
        engine = VllmEngine(chat, process, names=list(names.values()), settings=settings)
    except BaseException:
        process.close()
        raise
    if "merged" in kinds or config.adapters is None:
        return engine, None
    return engine, AdapterLoader(engine, record, root=config.adapters)


def _adapted(artifacts: Artifacts, folder: Path, record: Mapping[str, Any], names: Mapping[str, str]) -> VllmModel:
    method = record["quantization"]["settings"]["method"]
    if method not in SAME_WEIGHTS:
        raise ModelError(
            f"{folder} was trained on a base quantized by {method}, which vLLM does not compute; serve the merged "
            "model (export=[safetensors], --models merged), or leave out --engine vllm"
        )
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("trainable_token_indices"):
        raise ModelError(
            f"{folder} has trained tokens, which vLLM would leave out; serve the merged model (export=[safetensors], "
            "--models merged), or leave out --engine vllm"
        )
    return VllmModel(
        weights=find_base(folder, dict(record), base=artifacts.base).folder,
        tokenizer=folder,
        name=names.get("base", "base"),
        dtype=record["computation"]["dtype"],
        adapter=(names.get("adapter", "adapter"), folder),
        rank=max([settings["r"], *(settings.get("rank_pattern") or {}).values()]),
    )
