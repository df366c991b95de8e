"""What a run measured, which a server must reproduce: chats as token ids, answers, losses and scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import ConfigError
from finetune.files import read_json

QUANTIZED_BASE = "base_quantized"
SERVED = {"base": QUANTIZED_BASE, "merged": "merged", "adapter": "adapter"}
"""Artifact of the evaluation by the name that this project's server gives to a model."""

OF_ADAPTER = ("adapter", "gguf_lora")
"""Formats of exports that give the adapted model; others are made from the merged one."""

TOKENIZERS = ("export/adapter", "export/safetensors", "merge/model")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A held-out row with the answer that the artifact gave.

    Attributes:
        row: With ``prompt_ids``, ``input_ids``, ``labels``, ``reference``, and what metrics need.
        chat: ``messages`` and perhaps ``tools``; None for raw text, and where they do not give exactly the prompt.
        text: The answer.
        stopped: Whether it ended within the limit; None where the run does not say.
    """

    row: dict[str, Any]
    chat: dict[str, Any] | None
    text: str
    stopped: bool | None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What one artifact of a run gave.

    Attributes:
        artifact: ``adapter``, ``merged``, ``base_quantized``, ``base``, or an export.
        chats: Reference chats that the template can write.
        chat_tokens: Their token ids, generation prompt included.
        rows: Held-out rows with answers, in the order of the evaluation.
        scored: The held-out rows of the losses.
        losses: Of these, ``(nats, trained tokens)`` each.
        rounding: What the run allows the loss to differ by: for an export with fewer bits, what they cost; 0 otherwise.
        metrics: Of the task.
        max_new_tokens: Limit of an answer.
        seed: Of the intervals.
        longest: Chat that is as long as the longest row of the data, and its number of tokens; None where the tokenizer
            has no template.
    """

    artifact: str
    chats: list[list[dict[str, str]]]
    chat_tokens: list[list[int]]
    rows: list[Wanted]
    scored: list[dict[str, Any]]
    losses: list[tuple[float, int]]
    rounding: float
    metrics: list[str]
    max_new_tokens: int
    seed: int
    longest: tuple[list[dict[str, str]], int] | None


def read_reference(run: Path, *, artifact: str, model: str, rows: int) -> Reference:
    """Reads what a run measured.

    Args:
        run: Its folder.
        artifact: Empty: what the model's name says, and otherwise the adapter.
        model: Name of the model on the server.
        rows: Held-out rows to read, at most.

    Raises:
        ConfigError: There is no run, it has no evaluation or tokenizer, or not this artifact.
    """
    config = read_config(run)
    exports = _exports(run)
    name = artifact or _artifact_of(model, exports)
    measured = name
    if name in exports:
        measured = "adapter" if exports[name]["format"] in OF_ADAPTER else "merged"
    if not (run / "eval" / f"{measured}.rows.jsonl").is_file():
        known = [file.name.removesuffix(".rows.jsonl") for file in sorted((run / "eval").glob("*.rows.jsonl"))]
        raise ConfigError(f"verify --artifact {name}: {run} measured {', '.join([*known, *exports])}")
    from finetune.eval.metrics import prepare_rows
    from finetune.eval.records import read_record
    from finetune.inference.rows import read_rows

    record, heldout = read_record(run / "eval" / f"{measured}.rows.jsonl"), run / "data" / "heldout"
    read = read_rows(heldout, limit=max(len(record.losses), len(record.answers)))
    metrics = list(config["eval"]["metrics"])
    prepare_rows(read[: len(record.answers)], metrics, heldout)
    tokenizer, system = _tokenizer(run), _system(run)
    texts = _texts(run, name, measured)
    wanted = [
        Wanted(row=row, chat=_chat(tokenizer, row), text=text, stopped=_stopped(number, text, record, tokenizer))
        for number, (row, text) in enumerate(zip(read, texts, strict=False))
    ]
    chats, tokens = _reference_chats(tokenizer, system)
    return Reference(
        artifact=name,
        chats=chats,
        chat_tokens=tokens,
        rows=wanted[:rows],
        scored=read[: len(record.losses)][:rows],
        losses=[(row.loss, row.tokens) for row in record.losses][:rows],
        rounding=_rounding(exports.get(name)),
        metrics=metrics,
        max_new_tokens=int(config["eval"]["max_new_tokens"]),
        seed=int(config["run"]["seed"]),
        longest=_longest(run, tokenizer, system) if chats else None,
    )


def read_config(run: Path) -> dict[str, Any]:
    """Returns the configuration of a run that was evaluated.

    Raises:
        ConfigError: There is none.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"run.name: there is no run in {run}; give run.name (and run.root) of a finished run")
    if not (run / "eval" / "manifest.json").is_file():
        raise ConfigError(f"run.name: {run} has no evaluation yet; continue it with run.if_exists=resume")
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return config


def _exports(run: Path) -> dict[str, dict[str, Any]]:
    """Returns the run's exports that were compared with their model, by name."""
    file = run / "export" / "manifest.json"
    if not file.is_file():
        return {}
    exports = read_json(file, dict)["product"]["exports"]
    return {Path(export["path"]).name: export for export in exports if export.get("parity")}


def _artifact_of(model: str, exports: dict[str, dict[str, Any]]) -> str:
    if model == "gguf":
        return next((name for name, export in exports.items() if export["format"] == "gguf"), model)
    return SERVED.get(model) or (model if model in exports else "adapter")


def _texts(run: Path, name: str, measured: str) -> list[str]:
    """Returns the artifact's answers; those of the model that an export was made from where it has none of its own."""
    own = run / "export" / f"{name}.answers.jsonl"
    if own.is_file() and name != measured:
        return [json.loads(line)["answer"] for line in own.read_text(encoding="utf-8").splitlines()]
    samples = (run / "eval" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)[measured] for line in samples]


def _stopped(number: int, text: str, record: Any, tokenizer: Any) -> bool | None:
    """Returns whether the answer ended. An export's own answers say it only where they are the model's."""
    answer = record.answers.get(number)
    if answer is None or tokenizer.decode(answer.tokens, skip_special_tokens=True) != text:
        return None
    return bool(answer.stopped)


def _rounding(export: dict[str, Any] | None) -> float:
    """Returns by how much the loss of an export with fewer bits differs from that of its model."""
    parity = (export or {}).get("parity") or {}
    costs = [parity.get("loss_difference"), (parity.get("cost") or {}).get("loss_difference")]
    return sum(abs(cost["difference"]) for cost in costs if cost)


def _tokenizer(run: Path) -> Any:
    from transformers import AutoTokenizer

    folder = next((run / place for place in TOKENIZERS if (run / place / "tokenizer_config.json").is_file()), None)
    if folder is None:
        raise ConfigError(f"run.name: {run} has no tokenizer in {', '.join(TOKENIZERS)}; export=[adapter] writes one")
    return AutoTokenizer.from_pretrained(folder)


def _system(run: Path) -> str | None:
    file = run / "data" / "rendering.json"
    return json.loads(file.read_text(encoding="utf-8")).get("system") if file.is_file() else None


def _chat(tokenizer: Any, row: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the row's chat where it gives exactly the row's prompt; a shortened row has no such chat."""
    chat: dict[str, Any] | None = json.loads(row["chat"]) if row.get("chat") else None
    if chat is None or _render(tokenizer, chat["messages"], chat.get("tools")) != list(row["prompt_ids"]):
        return None
    return chat


def _render(tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Any = None) -> list[int] | None:
    """Returns the token ids of a chat with its generation prompt; None where the template refuses it."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    try:
        rendered = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=True)
    except (TemplateError, TypeError, ValueError):
        return None
    return list(rendered["input_ids"])


def _reference_chats(tokenizer: Any, system: str | None) -> tuple[list[list[dict[str, str]]], list[list[int]]]:
    from finetune.export.parity import REFERENCE_CHATS

    chats = [_with_system(messages, system) for messages in REFERENCE_CHATS]
    tokens = {number: ids for number, chat in enumerate(chats) if (ids := _render(tokenizer, chat)) is not None}
    return [chats[number] for number in tokens], list(tokens.values())


def _with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    """Returns the messages with the system message that the data stage added where there was none."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _longest(run: Path, tokenizer: Any, system: str | None) -> tuple[list[dict[str, str]], int] | None:
    """Returns a chat of almost as many tokens as the longest row of the data, and that number."""
    file = run / "data" / "lengths.json"
    longest = int(json.loads(file.read_text(encoding="utf-8"))["longest"]) if file.is_file() else 0

    def chat(words: int) -> tuple[list[dict[str, str]], int]:
        messages = _with_system([{"role": "user", "content": " ".join(["word"] * words)}], system)
        return messages, len(_render(tokenizer, messages) or [])

    low, high = 1, max(longest, 2)
    if chat(low)[1] >= longest:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if chat(middle)[1] < longest else (low, middle)
    return chat(low)
