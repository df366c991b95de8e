"""Prints the preparation in a few lines."""

import json

from finetune.console import log
from finetune.data.config import DataConfig
from finetune.objectives import PROMPT
from finetune.products import PreparedData


def log_summary(product: PreparedData, config: DataConfig) -> None:
    """Logs rows, lengths, tokens, packing and warnings."""
    rows = product.rows
    dropped = [f"{reason} ({count:,})" for reason, count in rows["dropped"].items()]
    dropped += [f"duplicate ({rows['duplicate']:,})"] if rows["duplicate"] else []
    trained = (
        f"to train on, {product.trained_tokens:,} of them ({product.trained_tokens / product.tokens:.1%}) with loss"
    )
    if config.objective == PROMPT:
        trained = f"of prompts and references, {product.trained_tokens:,} of them references; answers will be sampled"
    log(
        "data",
        f"{format_rows(rows['in'])} read, "
        f"{rows['kept']:,} kept ({product.train_rows:,} to train on, {product.heldout_rows:,} held out)"
        + (f"; dropped: {'; '.join(dropped)}" if dropped else "; none dropped")
        + (f"; {rows['truncated']:,} truncated" if rows["truncated"] else ""),
        f"lengths: {_quantiles(product)}; longest {product.lengths['longest']:,} tokens, limit {config.max_tokens:,}"
        + (f" ({_longer_rows(product, config)})" if product.lengths["longest"] > config.max_tokens else ""),
        f"{product.tokens:,} tokens {trained}",
    )
    if rows["rewritten"]:
        log(
            "data",
            f"{rows['rewritten']:,} conversations became {rows['rewritten_pieces']:,} rows, since the chat template "
            "rewrites earlier turns when later ones follow: each row is what serving sends and expects at its turn, "
            "and no turn is trained on twice",
        )
    mix = json.loads((product.folder / "rendering.json").read_text(encoding="utf-8"))["mix"]
    if mix:
        counts = ", ".join(f"{name} {format_rows(count)}" for name, count in mix.items())
        log("data", f"mix, before rows are held out: {counts}")
    capacity = config.pack_tokens or config.max_tokens
    if config.packing and product.packed_rows != product.train_rows:
        filled = product.tokens / (product.packed_rows * capacity)
        log("data", f"packed into {product.packed_rows:,} rows of {capacity:,} tokens, {filled:.1%} filled")
    for warning in product.warnings:
        log("data", f"warning: {warning}")
    log("data", f"preview: {product.folder / 'preview.html'}")


def format_rows(rows: int) -> str:
    """Formats a number of rows: ``1 row``, ``2,000 rows``."""
    return "1 row" if rows == 1 else f"{rows:,} rows"


def _quantiles(product: PreparedData) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in product.lengths["quantiles"].items())


def _longer_rows(product: PreparedData, config: DataConfig) -> str:
    shares = next(item for item in product.lengths["thresholds"] if item["max_tokens"] == config.max_tokens)
    return (
        f"{shares['rows_share']:.1%} of the rows with {shares['trained_tokens_share']:.1%} of the trained tokens "
        f"are longer: data.too_long={config.too_long}"
    )
