"""The commands that use a finished run: printed at its end, in its report, and in the model card.

Example::

    for use in run_commands(Path("outputs/mine"), [("adapter", "export/adapter")]):
        print(use.title, use.command)
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Export = tuple[str, str]
"""Format and path of an export, relative to the folder that the commands name."""

FOR_VLLM = ("safetensors", "gptq", "awq", "fp8")
"""Formats of the whole model that vLLM opens."""

SERVED = ("adapter", "safetensors", "gguf")
"""Formats that chat and serve open."""

LOCAL, OLLAMA = "127.0.0.1:8000", "127.0.0.1:11434"
"""Where `finetune serve` and vLLM, and Ollama, listen by default."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """One command.

    Attributes:
        title: What it is for.
        command: For a shell.
    """

    title: str
    command: str


def run_commands(run: Path, exports: Sequence[Export]) -> list[Use]:
    """Returns the commands for a run, from the folder that it was started in.

    Args:
        run: Its folder.
        exports: Format and path of each, relative to the run's folder.
    """
    if not _served(exports):
        return list(_programs(run, exports, model=run.name, verify=""))
    root = [] if str(run.parent) == "outputs" else [f"run.root={run.parent}"]
    name = shlex.join([f"run.name={run.name}", *root])
    formats = [kind for kind, _ in exports]
    model = run.name if "adapter" in formats or len(_served(exports)) == 1 else "merged"
    verify = f"finetune verify {name}"
    return [
        Use(title="chat", command=f"finetune chat {name}"),
        *([Use(title="compare", command=f"finetune chat {name} --compare")] if "adapter" in formats else []),
        Use(title="serve", command=f"finetune serve {name}"),
        Use(title="verify", command=f"{verify} url={LOCAL} model={shlex.quote(model)}"),
        *_programs(run, exports, model=run.name, verify=verify),
        *([Use(title="Python", command=_python(str(run)))] if {"adapter", "safetensors"} & {*formats} else []),
    ]


def export_commands(folder: Path, exports: Sequence[Export]) -> list[Use]:
    """Returns the commands for exports alone, from the folder that holds them.

    Args:
        folder: Holds them now.
        exports: Format and name of each.
    """
    others = [
        Use(title=use.title, command=use.command.replace(f"{folder}/", ""))
        for use in _programs(folder, exports, model="my-model", verify="")
    ]
    served = _served(exports)
    if not served:
        return others
    kind, path = served[0]
    target = shlex.quote(f"{path}/model.gguf" if kind == "gguf" else path)
    chat = Use(title="chat", command=f"finetune chat {target}")
    return [chat, Use(title="serve", command=f"finetune serve {target}"), *others]


def _programs(folder: Path, exports: Iterable[Export], *, model: str, verify: str) -> Iterator[Use]:
    """Yields the commands of other programs, each with the one that verifies it."""
    for kind, path in exports:
        file = folder / path
        if kind in FOR_VLLM:
            command = shlex.join(["vllm", "serve", str(file), "--served-model-name", "merged"])
            yield Use(title="vLLM" if kind == "safetensors" else f"vLLM, {kind}", command=command)
            if verify and kind == "safetensors":
                yield Use(title="verify vLLM", command=f"{verify} url={LOCAL} model=merged")
        elif kind == "gguf" and (file / "Modelfile").is_file():
            name = shlex.quote(model.lower())
            create = shlex.join(["ollama", "create", model.lower(), "-f", str(file / "Modelfile")])
            yield Use(title="Ollama", command=f"{create} && ollama run {name}")
            if verify:
                artifact = f"--artifact {shlex.quote(Path(path).name)}"
                yield Use(title="verify Ollama", command=f"{verify} url={OLLAMA} model={name} {artifact}")


def _served(exports: Sequence[Export]) -> list[Export]:
    return sorted((export for export in exports if export[0] in SERVED), key=lambda export: SERVED.index(export[0]))


def _python(folder: str) -> str:
    return shlex.join(["python", "-c", f"import finetune; model, tokenizer = finetune.load({json.dumps(folder)})"])
