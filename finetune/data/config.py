"""What a user may ask of the data."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from finetune.run import to_jsonable

FORMATS = (
    "auto", "alpaca", "messages", "prompt_completion", "sharegpt", "guanaco", "completion", "text", "preference", "unpaired",
)  # fmt: skip
TOO_LONG = ("drop", "truncate_prompt", "truncate", "split", "error")
BAD_ROWS = ("error", "drop")
DUPLICATES = ("drop", "keep")
ROLES = ("system", "user", "assistant", "tool")
TEXT_UNITS = ("line", "paragraph", "file")
CONTROL_TOKENS = ("text", "control")
TOOLS = ("template", "text")
OBJECTIVES = ("supervised", "preference")
NOT_IN_KEY = ("workers", "cache", "preview_rows")
"""Settings that leave the prepared rows as they are."""


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One of several sources that are mixed."""

    path: str | None = None
    """File, glob, folder, or several with commas between."""

    hub: str | None = None
    """Name of a data set on the hub, e.g. ``timdettmers/openassistant-guanaco``."""

    revision: str | None = None
    split: str | None = None
    format: str | None = None
    """Overrides ``data.format`` for this source."""

    columns: dict[str, str] = field(default_factory=dict)
    weight: float | None = None
    """Share of the mix, relative to the other weights; rows are left out until the shares hold."""

    rows: int | None = None
    """Exactly this many rows, drawn by the run's seed."""


@dataclass(kw_only=True, slots=True)
class CheckConfig:
    """Where a share of rows becomes a warning. 0 means any row, 1 means never."""

    near_duplicate_similarity: float
    """Two rows are near duplicates when they share this share of their token 5-grams (Jaccard)."""

    near_duplicate_share: float
    """Warn above this share of near duplicates."""

    overlap_share: float
    """A training row leaks when this share of its token 13-grams occurs in held-out rows."""

    overlap_rows_share: float
    """Warn above this share of overlapping training rows."""

    smallest_trained_share: float
    """Warn when fewer tokens than this are trained."""

    largest_label_share: float
    """Warn when one answer makes up more than this share of the rows, and answers repeat like labels."""

    control_character_share: float
    """Warn above this share of rows with control characters."""

    secret_share: float
    """Warn above this share of rows with what looks like keys or passwords."""

    email_share: float
    """Warn above this share of rows with e-mail addresses."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which rows, in which form, how long, and what is learnt from them."""

    path: str | None = None
    """File, glob or folder, several with commas between: JSON, JSONL, CSV, TSV, Parquet, Arrow, text; ``.gz`` too."""

    hub: str | None = None
    """Name of a data set on the hub, instead of ``path``."""

    revision: str | None = None
    split: str = "train"
    streaming: bool = False
    """Reads a hub data set as it comes, without downloading all of it first; with ``limit`` only its beginning."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sources by name, mixed by ``weight`` or ``rows``; instead of ``path`` and ``hub``."""

    heldout_path: str | None = None
    """Explicit held-out rows. Then nothing is split off the training rows."""

    heldout_share: float = 0.0
    """Share of the rows split off by content, so that equal prompts fall on one side. Used where ``heldout_rows`` is null."""

    heldout_rows: int | None = None
    """This many rows split off instead of a share."""

    format: str
    """``auto`` looks at the first rows and says what it found."""

    columns: dict[str, str] = field(default_factory=dict)
    """The format's own name of a column -> the name in the file, e.g. ``{prompt: question, completion: answer}``."""

    text_unit: str = "file"
    """What one row of a ``.txt`` file is: ``line``, ``paragraph`` (blank line between) or ``file``."""

    system: str | None = None
    """System message for rows that have none."""

    template: str | None = None
    """A chat template by name (``conf/data/template/<name>.jinja``) or file, for bases that bring none."""

    tools: str = "template"
    """``template``: the chat template writes tools and calls; ``text``: they are written into the messages as JSON."""

    control_tokens: str = "text"
    """What ``<|im_end|>`` and the like mean inside a message: ``text`` (spelt out, harmless) or ``control``."""

    max_tokens: int
    """Longest document, in tokens."""

    too_long: str
    """What happens to longer ones: ``drop``, ``truncate_prompt``, ``truncate``, ``split`` or ``error``."""

    packing: bool
    """Several documents per training row, isolated from each other by their positions."""

    pack_tokens: int | None = None
    """Tokens per packed row; ``max_tokens`` where null."""

    train_roles: list[str] = field(default_factory=lambda: ["assistant"])
    """Whose turns are learnt; a message's own ``train: false`` wins."""

    bad_rows: str
    """``error`` stops and names the first ones; ``drop`` counts them and says why in the ledger."""

    duplicates: str
    """``drop`` keeps the first of equal rows; ``keep`` only counts them."""

    leaked: str
    """Training rows that are held-out rows too: ``drop`` or ``keep``."""

    objective: str = "supervised"
    """``supervised`` learns the chosen and the desirable answers; ``preference`` writes the others beside them."""

    limit: int | None = None
    """Read at most this many rows of each split."""

    checks: CheckConfig
    workers: int = 0
    """Processes; 0 means one per core for large sets and none for small ones."""

    cache: str | None = None
    """Prepared data are kept here by content, so a second start reads them; null: in the cache of ``FINETUNE_CACHE``; empty: nowhere."""

    preview_rows: int = 20

    def key(self) -> dict[str, Any]:
        """Returns the settings that change the prepared rows."""
        settings: dict[str, Any] = to_jsonable(self)
        return {name: value for name, value in settings.items() if name not in NOT_IN_KEY}

    def problems(self) -> Iterator[str]:
        yield from _where(self)
        yield from _choices(self)
        yield from _numbers(self)


def _where(config: DataConfig) -> Iterator[str]:
    given = [name for name in ("path", "hub", "sources") if getattr(config, name)]
    if len(given) != 1:
        got = " and ".join(f"data.{name}" for name in given) or "none"
        yield f"data.path, data.hub or data.sources must be given, one of them; got {got}; e.g. data.path=rows.jsonl"
    for name, source in config.sources.items():
        where = f"data.sources.{name}"
        if bool(source.path) == bool(source.hub):
            yield f"{where} must have either path or hub; got {'both' if source.path else 'neither'}"
        if source.weight is not None and source.rows is not None:
            yield f"{where}: weight and rows exclude each other; got {source.weight} and {source.rows}; leave one out"
        if source.weight is not None and source.weight <= 0:
            yield f"{where}.weight must be more than 0; got {source.weight}; leave the source out instead"
        if source.rows is not None and source.rows < 1:
            yield f"{where}.rows must be at least 1; got {source.rows}; leave the source out instead"
        if source.format is not None and source.format not in FORMATS:
            yield f"{where}.format must be one of {', '.join(FORMATS)}; got {source.format!r}"
    weighted = [source.weight is not None for source in config.sources.values()]
    if any(weighted) and not all(weighted):
        yield "data.sources: either every source has a weight or none has; give the others one too, or use rows"


def _choices(config: DataConfig) -> Iterator[str]:
    choices = {
        "format": FORMATS, "too_long": TOO_LONG, "bad_rows": BAD_ROWS, "duplicates": DUPLICATES, "leaked": DUPLICATES,
        "text_unit": TEXT_UNITS, "control_tokens": CONTROL_TOKENS, "tools": TOOLS, "objective": OBJECTIVES,
    }  # fmt: skip
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            yield f"data.{name} must be one of {', '.join(allowed)}; got {getattr(config, name)!r}"
    unknown = [role for role in config.train_roles if role not in ROLES]
    if unknown:
        yield f"data.train_roles may hold {', '.join(ROLES)}; got {unknown}"
    if not config.train_roles:
        yield "data.train_roles is empty, so nothing would be learnt; use [assistant]"


def _numbers(config: DataConfig) -> Iterator[str]:
    if config.max_tokens < 8:
        yield f"data.max_tokens must be at least 8; got {config.max_tokens}"
    if config.pack_tokens is not None and config.pack_tokens < config.max_tokens:
        yield (
            f"data.pack_tokens must not be less than data.max_tokens ({config.max_tokens}), or long rows would fit nowhere; "
            f"got {config.pack_tokens}"
        )
    if not 0 <= config.heldout_share < 1:
        yield f"data.heldout_share must be at least 0 and below 1; got {config.heldout_share}"
    for name in ("heldout_rows", "limit"):
        value = getattr(config, name)
        if value is not None and value < 1:
            yield f"data.{name} must be at least 1; got {value}; leave it null for none"
    if config.objective == "preference" and config.too_long == "split":
        yield "data.too_long=split cannot keep the two answers of a preference row together; use drop, truncate_prompt or truncate"
    if config.heldout_path and config.heldout_rows is not None:
        yield "data.heldout_rows splits rows off the training rows, but data.heldout_path names them already; leave one out"
    if config.workers < 0:
        yield f"data.workers must not be negative; got {config.workers}; 0 lets us choose"
    if config.preview_rows < 0:
        yield f"data.preview_rows must not be negative; got {config.preview_rows}"
    for name in CheckConfig.__dataclass_fields__:
        value = getattr(config.checks, name)
        if not 0 <= value <= 1:
            yield f"data.checks.{name} is a share between 0 and 1; got {value}"
