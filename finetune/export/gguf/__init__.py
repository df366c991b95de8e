"""The merged model as one GGUF, for llama.cpp and what is built on it, with a Modelfile for Ollama."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.export.config import ExportConfig
from finetune.export.context import Work
from finetune.export.needs import check_packages

if TYPE_CHECKING:
    from finetune.export.parity import Expected

FILE = "model.gguf"


def write(work: Work, name: str, settings: ExportConfig) -> dict[str, Any]:
    """Converts the merged model, and opens it by llama.cpp."""
    check_packages({name: settings})
    from transformers import AutoTokenizer

    from finetune.export.gguf import ollama
    from finetune.export.gguf.file import write_model

    source, target = work.merged.folder / "model", work.desk / name
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=work.spec.config.trust_remote_code)
    chat = dataclasses.replace(work.chat, tokenizer=tokenizer)
    target.mkdir()
    notes = write_model(
        source, target / FILE, chat=chat, numbers=settings.numbers, name=work.spec.base.name, threads=work.spec.placement.threads
    )  # fmt: skip
    notes += ollama.write(target / "Modelfile", chat, source=f"FROM ./{FILE}")
    snippet = server_snippet(f"{name}/{FILE}", ollama=f"{name}/Modelfile" if tokenizer.chat_template else "")
    parity = check(work, name, settings, work.expect_merged(settings), snippet=snippet)
    for note in notes:
        log("export", f"{name}: {note}")
    work.snippets[f"The merged model as {settings.numbers.upper()}, in llama.cpp"] = snippet
    return {**work.keep(name, settings, parity), "notes": notes}


def check(work: Work, name: str, settings: ExportConfig, wanted: Expected, *, snippet: str) -> dict[str, Any]:
    """Opens an export by llama.cpp, in a process that has seen nothing else."""
    return work.check(
        name, settings, wanted, snippet=snippet, ends=work.chat.ends, packages=["xllamacpp"], runtime="finetune.export.gguf_runtime"
    )  # fmt: skip


def server_snippet(model: str, *, adapter: str = "", ollama: str = "") -> str:
    """llama.cpp's server inside Python.

    Args:
        model: The GGUF's path, as seen from where the code runs.
        adapter: A LoRA's, to lie on top of it.
        ollama: A Modelfile's.
    """
    laid = [f"params.lora_adapters = [CommonAdapterLoraInfo({adapter!r}, 1.0)]"] if adapter else []
    return "\n".join([
        *([f"# In Ollama: ollama create my-model -f {ollama}, then ollama run my-model"] if ollama else []),
        f"from xllamacpp import {'CommonAdapterLoraInfo, ' if adapter else ''}CommonParams, Server",
        "",
        "params = CommonParams()",
        f"params.model.path = {model!r}",
        *laid,
        "params.n_ctx = 2048",
        "params.sampling.temp = 0",
        "server = Server(params)",
        "",
        'messages = [{"role": "user", "content": "Hello!"}]',
        'answer = server.handle_chat_completions({"messages": messages, "max_tokens": 32})',
        'print(answer["choices"][0]["message"]["content"])',
    ])  # fmt: skip
