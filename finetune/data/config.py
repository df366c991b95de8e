"""Settings of the data: sources, format, length, packing, loss mask, held-out rows and checks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from finetune.data.check_config import CheckConfig
from finetune.data.limit_config import LimitConfig
from finetune.jsonable import to_jsonable
from finetune.objectives import PREFERENCE, PROMPT, SUPERVISED, UNPAIRED, format_problem

FORMATS = (
    "auto",
    "alpaca",
    "messages",
    "prompt_completion",
    "sharegpt",
    "guanaco",
    "completion",
    "text",
    "preference",
    "unpaired",
    "prompt",
)
TOO_LONG = ("drop", "truncate_prompt", "truncate", "split", "error")
BAD_ROWS = ("error", "drop")
DUPLICATES = ("drop", "keep")
ROLES = ("system", "user", "assistant", "tool")
TEXT_UNITS = ("line", "paragraph", "file")
CONTROL_TOKENS = ("text", "control")
TOOLS = ("template", "text")
OBJECTIVES = (SUPERVISED, PREFERENCE, UNPAIRED, PROMPT)
THINKING = ("auto", "train", "drop", "off")
TEMPLATE_DATE = "2024-07-26"
"""The date that the template of Llama 3.1 writes where it is given none."""
NOT_IN_KEY = ("workers", "cache", "preview_rows", "limits")
"""Settings that leave the prepared rows as they are."""


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One of several mixed sources."""

    path: str | None = None
    """File, glob or folder; several are separated by commas."""

    hub: str | None = None
    """Name of a data set on the hub, e.g. ``timdettmers/openassistant-guanaco``."""

    revision: str | None = None
    """Overrides ``data.revision`` for this source."""

    split: str | None = None
    """Overrides ``data.split`` for this source."""

    format: str | None = None
    """Overrides ``data.format`` for this source."""

    columns: dict[str, str] = field(default_factory=dict)
    """Overrides ``data.columns`` for this source."""

    weight: float | None = None
    """Share of the mix, relative to the other weights; rows are dropped until the shares are met."""

    rows: int | None = None
    """Exactly this many rows, drawn by the run's seed."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Selects the rows, their format and length, and the tokens to train on."""

    path: str | None = None
    """File, glob or folder, several separated by commas: JSON, JSONL, CSV, TSV, Parquet, Arrow, text; also ``.gz``."""

    hub: str | None = None
    """Name of a data set on the hub, instead of ``path``."""

    revision: str | None = None
    """Commit, branch or tag of a hub data set; None: the newest."""

    split: str = "train"
    """Split of a hub data set to train on."""

    streaming: bool = False
    """Reads a hub data set while it downloads; with ``limit``, only its beginning is downloaded."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sources by name, mixed by ``weight`` or ``rows``; instead of ``path`` and ``hub``."""

    heldout_path: str | None = None
    """Explicit held-out rows. No training rows are held out then."""

    heldout_share: float = 0.0
    """Share of the rows to hold out, by content: equal prompts stay together. Used where ``heldout_rows`` is null."""

    heldout_rows: int | None = None
    """Number of rows to hold out, instead of a share."""

    format: str
    """``auto`` detects the format from the first rows and logs it."""

    columns: dict[str, str] = field(default_factory=dict)
    """Column name of the format -> column name in the file, e.g. ``{prompt: question, completion: answer}``."""

    text_unit: str = "file"
    """What one row of a ``.txt`` file is: ``line``, ``paragraph`` (separated by blank lines) or ``file``."""

    system: str | None = None
    """System message for rows that have none."""

    template: str | None = None
    """Chat template by name (``conf/data/template/<name>.jinja``, or ``trl:<name>`` for one that the installed trl
    ships) or file. It replaces the tokenizer's own, and is exported with the model."""

    template_date: str = TEMPLATE_DATE
    """ISO date that a template gets where it writes the date of the day, so that the rows are the same every day."""

    thinking: str = "auto"
    """Thoughts of reasoning models: ``<think>...</think>`` in an answer, ``reasoning_content``, ``thinking``.

    - ``train``: thoughts are trained on, and the model thinks in evaluation and serving.
    - ``off``: thoughts are removed from the rows, and the template's ``enable_thinking`` is false: serving sends an
      empty thought where the template writes one, and the answer alone is trained on.
    - ``drop``: thoughts are removed, and the template keeps its default: an empty thought may be trained on.
    - ``auto``: where the template can turn thoughts on and off, ``train`` if the first rows have thoughts, else ``off``
      (a later row with a thought is then a bad row). Other templates take the rows as they are.

    The exported chat template has the chosen mode."""

    tools: str = "template"
    """``template``: the chat template renders tools and calls; ``text``: they become JSON inside the messages."""

    control_tokens: str = "text"
    """Meaning of control tokens such as ``<|im_end|>`` inside a message: ``text`` (harmless) or ``control``."""

    max_tokens: int
    """Longest document, in tokens."""

    too_long: str
    """Treatment of longer documents: ``drop``, ``truncate_prompt``, ``truncate``, ``split`` or ``error``."""

    packing: bool
    """Puts several documents into one training row, isolated from each other by their positions."""

    pack_tokens: int | None = None
    """Tokens per packed row; ``max_tokens`` where null."""

    train_roles: list[str] = field(default_factory=lambda: ["assistant"])
    """Roles whose turns are trained on; a message's own ``train: false`` takes precedence."""

    bad_rows: str
    """``error`` stops and names the first ones; ``drop`` counts them and records why in the ledger."""

    duplicates: str
    """``drop`` keeps the first of equal rows; ``keep`` only counts them."""

    leaked: str
    """Treatment of training rows that are also held-out rows: ``drop`` or ``keep``."""

    objective: str = "supervised"
    """``supervised`` trains on the chosen and desirable answers; ``preference`` writes pairs; ``unpaired`` writes
    single answers with a label, and takes pairs apart; ``prompt`` writes prompts with their reference and tests."""

    limit: int | None = None
    """Largest number of rows to read from each split."""

    checks: CheckConfig
    """Thresholds of the warnings about the rows."""

    limits: LimitConfig = field(default_factory=LimitConfig)
    """Limits of what files and the chat template may take."""

    workers: int = 0
    """Number of processes; 0 uses one per core for large data sets and none for small ones."""

    cache: str | None = None
    """Folder for prepared data, which the next run reuses; null: below ``FINETUNE_CACHE``; empty: no cache."""

    preview_rows: int = 20
    """Number of training rows in ``preview.html``."""

    def key(self) -> dict[str, Any]:
        """Returns the settings that change the prepared rows."""
        settings: dict[str, Any] = to_jsonable(self)
        return {name: value for name, value in settings.items() if name not in NOT_IN_KEY}

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yields the settings that have no effect given the others, each with the reason."""
        if self.heldout_path is not None:
            yield "heldout_share", f"data.heldout_path={self.heldout_path} names the held-out rows"
        elif self.heldout_rows is not None:
            yield "heldout_share", f"data.heldout_rows={self.heldout_rows} is set"
        if not self.hub and not any(source.hub for source in self.sources.values()):
            yield from ((name, "no data come from the hub") for name in ("revision", "streaming"))
        if not self.packing:
            yield "pack_tokens", "data.packing=false"

    def problems(self) -> Iterator[str]:
        yield from _source_problems(self)
        yield from _choice_problems(self)
        yield from _number_problems(self)
        yield from self.limits.problems()


def _source_problems(config: DataConfig) -> Iterator[str]:
    named = [name for name in ("path", "hub", "sources") if getattr(config, name)]
    if len(named) > 1:  # none is enough for a plan; `resolve_sources` needs one
        got = " and ".join(f"data.{name}" for name in named)
        yield f"set exactly one of data.path, data.hub and data.sources; got {got}; e.g. data.path=rows.jsonl"
    for name, source in config.sources.items():
        where = f"data.sources.{name}"
        if bool(source.path) == bool(source.hub):
            got = "both" if source.path else "neither"
            yield f"{where} must have either path or hub; got {got}; set one of them"
        if source.weight is not None and source.rows is not None:
            yield f"{where}: weight and rows exclude each other; got {source.weight} and {source.rows}; remove one"
        if source.weight is not None and source.weight <= 0:
            yield f"{where}.weight must be greater than 0; got {source.weight}; to skip the source, remove it"
        if source.rows is not None and source.rows < 1:
            yield f"{where}.rows must be at least 1; got {source.rows}; to skip the source, remove it"
        if source.format is not None and source.format not in FORMATS:
            yield f"{where}.format must be one of {', '.join(FORMATS)}; got {source.format!r}"
    weighted = [source.weight is not None for source in config.sources.values()]
    if any(weighted) and not all(weighted):
        yield "data.sources: either all sources have a weight or none has; add the missing weights, or use rows"


def _choice_problems(config: DataConfig) -> Iterator[str]:
    choices = {
        "format": FORMATS,
        "too_long": TOO_LONG,
        "bad_rows": BAD_ROWS,
        "duplicates": DUPLICATES,
        "leaked": DUPLICATES,
        "text_unit": TEXT_UNITS,
        "control_tokens": CONTROL_TOKENS,
        "tools": TOOLS,
        "objective": OBJECTIVES,
        "thinking": THINKING,
    }
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            yield f"data.{name} must be one of {', '.join(allowed)}; got {getattr(config, name)!r}"
    for form in [source.format for source in config.sources.values()] or [config.format]:
        if form in FORMATS[1:] and (problem := format_problem(config.objective, str(form), where="data")):
            yield problem
    unknown = [role for role in config.train_roles if role not in ROLES]
    if unknown:
        yield f"data.train_roles may contain {', '.join(ROLES)}; got {unknown}"
    if not config.train_roles:
        yield "data.train_roles is empty, so no token would be trained on; use [assistant]"


def _number_problems(config: DataConfig) -> Iterator[str]:
    if config.max_tokens < 8:
        yield f"data.max_tokens must be at least 8; got {config.max_tokens}"
    if config.pack_tokens is not None and config.pack_tokens < config.max_tokens:
        yield (
            f"data.pack_tokens must be at least data.max_tokens ({config.max_tokens}), or long documents do not fit; "
            f"got {config.pack_tokens}"
        )
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", config.template_date):
        yield f"data.template_date must be a date such as {TEMPLATE_DATE}; got {config.template_date!r}"
    if not 0 <= config.heldout_share < 1:
        yield f"data.heldout_share must be at least 0 and below 1; got {config.heldout_share}"
    for name in ("heldout_rows", "limit"):
        value = getattr(config, name)
        if value is not None and value < 1:
            yield f"data.{name} must be at least 1; got {value}; null turns it off"
    if config.objective != SUPERVISED and config.too_long == "split":
        yield (
            f"data.too_long=split would cut the answers that data.objective={config.objective} compares; "
            "use drop, truncate_prompt or truncate"
        )
    if config.heldout_path and config.heldout_rows is not None:
        yield "data.heldout_rows and data.heldout_path both name the held-out rows; set one to null"
    if config.workers < 0:
        yield f"data.workers must not be negative; got {config.workers}; 0 chooses by the size of the data"
    if config.preview_rows < 0:
        yield f"data.preview_rows must not be negative; got {config.preview_rows}"
    for name in CheckConfig.__dataclass_fields__:
        value = getattr(config.checks, name)
        if not 0 <= value <= 1:
            yield f"data.checks.{name} must be between 0 and 1; got {value}"
