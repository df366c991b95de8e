"""The preparation in a few printed lines."""

import json

from finetune.console import log
from finetune.data.config import DataConfig
from finetune.products import PreparedData


def say_summary(product: PreparedData, config: DataConfig) -> None:
    """Rows, lengths, tokens, packing, warnings."""
    rows = product.rows
    lost = [f"{reason} ({count:,})" for reason, count in rows["dropped"].items()]
    lost += [f"duplicate ({rows['duplicate']:,})"] if rows["duplicate"] else []
    log(
        "data",
        f"{count_of(rows['in'])} read, "
        f"{rows['kept']:,} kept ({product.train_rows:,} to train on, {product.heldout_rows:,} held out)"
        + (f"; left out: {'; '.join(lost)}" if lost else "; none left out")
        + (f"; {rows['truncated']:,} truncated" if rows["truncated"] else ""),
        f"lengths: {_quantiles(product)}; longest {product.lengths['longest']:,} tokens, limit {config.max_tokens:,}"
        + (f" ({_cut(product, config)})" if product.lengths["longest"] > config.max_tokens else ""),
        f"{product.tokens:,} tokens to train on, {product.trained_tokens:,} of them ({product.trained_tokens / product.tokens:.1%}) learnt",
    )
    mix = json.loads((product.folder / "rendering.json").read_text(encoding="utf-8"))["mix"]
    if mix:
        log(
            "data",
            f"mixed, before rows are held out: {', '.join(f'{name} {count_of(count)}' for name, count in mix.items())}",
        )
    capacity = config.pack_tokens or config.max_tokens
    if product.packed_rows != product.train_rows:
        filled = product.tokens / (product.packed_rows * capacity)
        log("data", f"packed into {product.packed_rows:,} rows of {capacity:,} tokens, {filled:.1%} filled")
    for warning in product.warnings:
        log("data", f"warning: {warning}")
    log("data", f"preview: {product.folder / 'preview.html'}")


def count_of(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows:,} rows"


def _quantiles(product: PreparedData) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in product.lengths["quantiles"].items())


def _cut(product: PreparedData, config: DataConfig) -> str:
    here = next(item for item in product.lengths["thresholds"] if item["max_tokens"] == config.max_tokens)
    return (
        f"{here['rows_share']:.1%} of the rows with {here['trained_tokens_share']:.1%} of the trained tokens are longer: "
        f"data.too_long={config.too_long}"
    )
