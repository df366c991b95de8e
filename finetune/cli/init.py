"""The command ``init``: a commented experiment for a model and a file of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cli.command import Command, Invocation, Option
from finetune.cli.convert import experiment_file
from finetune.cli.look import card_machines
from finetune.config import RunConfig, load
from finetune.config.model_option import option_of
from finetune.console import log
from finetune.errors import EXIT_OK, ConfigError
from finetune.files import atomic_write_text
from finetune.paths import CONF
from finetune.plan.cards import cell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURED_ROWS = 500
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
ROW_TOKENS = 16
"""Allowance for the template's marks around one text of a row."""

COVERED = 0.99
"""Share of the measured rows that fit the chosen length."""

PLAIN_TEMPLATE = "alpaca"
"""For a tokenizer without a chat template: marks in plain text, which every vocabulary has."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What the first rows of a file are.

    Attributes:
        format: A format of ``data.format``.
        count: Number of rows that were measured.
        tokens: Estimated tokens of each, ascending.
    """

    format: str
    count: int
    tokens: tuple[int, ...]

    def max_tokens(self, limit: int | None) -> int:
        """Returns the smallest usual length that holds `COVERED` of the rows, at most the model's."""
        needed = self.tokens[min(int(self.count * COVERED), self.count - 1)]
        length = next((length for length in LENGTHS if length >= needed), LENGTHS[-1])
        return min(length, limit) if limit else length

    def too_long(self, max_tokens: int) -> int:
        """Returns the number of measured rows beyond a length."""
        return sum(tokens > max_tokens for tokens in self.tokens)


def _init(invocation: Invocation) -> int:
    """Looks at the rows and the tokenizer, and writes the experiment."""
    model, path = invocation.options["model"], invocation.options["data"]
    missing = [
        f"init needs --{name}, e.g. {INIT.example}" for name in ("model", "data") if not invocation.options[name]
    ]
    if missing:
        raise ConfigError(*missing)
    name = invocation.options["name"] or re.sub(r"[^\w-]", "_", Path(path).name.partition(".")[0]) or "mine"
    target = experiment_file(name, command="init")
    config = load([f"model.name={model}", f"data.path={path}"])
    tokenizer, limit = _tokenizer(config)
    rows = _measure(config, tokenizer)
    has_template = bool(tokenizer.chat_template) or rows.format in ("text", "completion")
    text = "\n".join(_lines(name, config, rows, has_template=has_template, max_tokens=rows.max_tokens(limit))) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(target, text)
    written = load([f"+experiment={name}"])
    cards = {card: cell(written, machine) for card, machine in card_machines().items()} if limit else {}
    atomic_write_text(target, text + "".join(f"{line}\n" for line in _card_lines(cards)))
    log("init", f"{path}: {rows.format}, {rows.count} rows read, wrote {target}")
    log("init", *(line.removeprefix("# ") for line in _card_lines(cards)))
    log("init", f"next: finetune plan +experiment={name}", f"then: finetune +experiment={name}")
    return EXIT_OK


def _tokenizer(config: RunConfig) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Returns the tokenizer and the longest input of the model; downloads a few small files, no weights."""
    from finetune.model.base import dimensions, find
    from finetune.model.load import load_tokenizer

    files = find(config.model)
    return load_tokenizer(files, template=config.model.template), dimensions(config.model).max_positions


def _measure(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Rows:
    from finetune.data.read import resolve_formats
    from finetune.data.sources import resolve_sources
    from finetune.data.worker import parse_object

    sources = resolve_sources(config.data)
    formats = resolve_formats(sources)
    raws = [parse_object(value) for _, value in sources[0].rows(MEASURED_ROWS)]
    texts = [list(_texts(raw)) for raw in raws if raw]
    tokens = [sum(len(ids) + ROW_TOKENS for ids in tokenizer(each)["input_ids"]) if each else 0 for each in texts]
    return Rows(formats[0][0], len(tokens), tuple(sorted(tokens)))


def _texts(value: Any) -> Iterator[str]:
    """Yields every text in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _lines(name: str, config: RunConfig, rows: Rows, *, has_template: bool, max_tokens: int) -> Iterator[str]:
    """Yields the experiment, a comment for each choice."""
    option = option_of(config.model.name, [CONF])
    is_pairs = rows.format == "preference"
    yield from (
        "# @package _global_",
        "# Written by `finetune init`; change what you like, then",
        "#",
        *_commands(name),
    )
    yield "defaults:"
    if option:
        yield f"  - override /model: {option} # its dimensions are known"
    yield "  - override /quantization: nf4_double # the frozen base in 4 bits; none, int8 and others: finetune --groups"
    if is_pairs:
        yield "  - override /train: dpo # the rows are pairs of answers"
    metrics = (
        "loss # no answers are scored" if is_pairs or rows.format in ("text", "completion") else "text # ROUGE, F1"
    )
    yield f"  - override /eval: {metrics}; label, number, json and code fit those tasks"
    yield from ("", "run:", f"  name: {name} # the folder outputs/{name}")
    if not option:
        yield from ("", "model:", f"  name: {config.model.name}")
    yield from ("", "data:", f"  path: {config.data.path}", f"  format: {rows.format} # as detected")
    if is_pairs:
        yield "  objective: preference"
    longer = rows.too_long(max_tokens)
    yield (
        f"  max_tokens: {max_tokens} # about {rows.tokens[-1]} tokens in the longest of the first {rows.count} rows, "
        f"{longer} of them longer; they are counted and left out"
    )
    template = "null # the tokenizer's own" if has_template else f"{PLAIN_TEMPLATE} # the tokenizer has none"
    yield f"  template: {template}"
    yield "  heldout_share: 0.02 # never trained on; merge and scores are measured on them"
    yield from ("", "lora:", "  rank: 16", "  alpha: 32 # the update is scaled by alpha / rank")
    if is_pairs:
        yield "  dropout: 0.0 # DPO compares two passes, which dropout would make different"
    yield from ("", "train:", "  epochs: 1", "  micro_batch: auto # the fastest that fits your device, by the plan")
    yield from (
        "",
        "optim:",
        f"  learning_rate: {'5e-5' if is_pairs else '2e-4 # QLoRA paper, table 9, for 7B and 13B'}",
    )


def _commands(name: str) -> list[str]:
    return [
        f"#   finetune plan +experiment={name}    does it fit; no weights are downloaded",
        f"#   finetune +experiment={name}         train, merge, evaluate, export, report",
        f"#   finetune chat run.name={name}       talk to the result",
    ]


def _card_lines(cards: dict[str, str]) -> list[str]:
    """Returns which cards hold training, by the plan."""
    if not cards:
        return []
    fits = [card for card, text in cards.items() if not text.startswith("no")]
    smallest = (
        f"the smallest card that holds training: {fits[0]}" if fits else "none of the planned cards holds training"
    )
    shown = "; ".join(f"{card} {text}" for card, text in cards.items())
    return [f"# By the plan, {smallest}.", f"# GiB of training (micro-batch, checkpointing): {shown}"]


INIT = Command(
    "init", "an experiment with comments for your model and rows", _init, settings=(),
    options=(
        Option("model", "hub id, folder or .gguf file", "MODEL", default=""),
        Option("data", "file, folder or glob of rows", "PATH", default=""),
        Option("name", "name of the experiment; that of the rows by default", "NAME", default=""),
    ),
    example="finetune init --model org/model --data rows.jsonl",
)  # fmt: skip
