"""Exports the merged model as GGUF, and checks it in llama.cpp."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from finetune.console import log
from finetune.export.config import ExportConfig
from finetune.export.context import ExportContext
from finetune.export.needs import check_packages
from finetune.products import ExportResult
from finetune.scores import Parity

if TYPE_CHECKING:
    from finetune.export.parity import Expected

FILE = "model.gguf"


def write(context: ExportContext, name: str, settings: ExportConfig) -> ExportResult:
    """Converts the merged model, loads it in llama.cpp and compares; returns the export's description."""
    check_packages({name: settings})
    from transformers import AutoTokenizer

    from finetune.export.gguf.file import write_model
    from finetune.export.gguf.ollama import write_modelfile

    source, target, dtype = context.merged.folder / "model", context.scratch / name, settings.dtype
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=context.spec.config.trust_remote_code)
    chat = dataclasses.replace(context.chat, tokenizer=tokenizer)
    target.mkdir()
    threads = context.spec.placement.threads
    notes = write_model(
        source, target / FILE, chat=chat, dtype=dtype, name=context.spec.base.public_name, threads=threads
    )
    notes += write_modelfile(target / "Modelfile", chat, source=f"FROM ./{FILE}")
    snippet = server_snippet(f"{name}/{FILE}", ollama=f"{name}/Modelfile" if tokenizer.chat_template else "")
    parity = check(context, name, settings, context.expected_merged_output(settings), snippet=snippet)
    for note in notes:
        log("export", f"{name}: {note}")
    context.snippets[f"The merged model as {dtype.upper()}, in llama.cpp"] = snippet
    return context.publish(name, settings, parity, notes=notes)


def check(context: ExportContext, name: str, settings: ExportConfig, wanted: Expected, *, snippet: str) -> Parity:
    """Loads an export in llama.cpp, in a fresh process, and compares it with its model."""
    ends, runtime = context.chat.ends, "finetune.export.gguf_runtime"
    return context.check(name, settings, wanted, snippet=snippet, ends=ends, packages=["xllamacpp"], runtime=runtime)


def server_snippet(model: str, *, adapter: str = "", ollama: str = "") -> str:
    """Returns code that runs llama.cpp's server inside Python.

    Args:
        model: Path of the GGUF, relative to where the code runs.
        adapter: Path of a LoRA to apply to it.
        ollama: Path of a Modelfile.
    """
    names = "CommonAdapterLoraInfo, CommonParams, Server" if adapter else "CommonParams, Server"
    lines = [
        *([f"# In Ollama: ollama create my-model -f {ollama}, then ollama run my-model"] if ollama else []),
        f"from xllamacpp import {names}",
        "",
        "params = CommonParams()",
        f"params.model.path = {model!r}",
        *([f"params.lora_adapters = [CommonAdapterLoraInfo({adapter!r}, 1.0)]"] if adapter else []),
        "params.n_ctx = 2048",
        "params.sampling.temp = 0",
        "server = Server(params)",
        "",
        'messages = [{"role": "user", "content": "Hello!"}]',
        'answer = server.handle_chat_completions({"messages": messages, "max_tokens": 32})',
        'print(answer["choices"][0]["message"]["content"])',
    ]
    return "\n".join(lines)
