"""Helpers of the data tests."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.data.config import CheckConfig
from finetune.inference.rows import IGNORED
from finetune.products import PreparedData


def checks(**changes: float) -> CheckConfig:
    thresholds = dict.fromkeys(CheckConfig.__dataclass_fields__, 1.0) | {
        "near_duplicate_similarity": 0.8,
        "overlap_share": 0.5,
    }
    return CheckConfig(**{**thresholds, "smallest_trained_share": 0.0, **changes})


def write_jsonl(file: Path, rows: Iterable[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pair(prompt: str = "What is up?", completion: str = "The sky.") -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def split(product: PreparedData, name: str) -> list[dict[str, Any]]:
    from finetune.data.show.documents import SplitFile

    return SplitFile(product.folder / name).table.to_pylist()


def ledger(product: PreparedData) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(product.folder / "ledger.parquet").to_pylist()


def trained_text(row: dict[str, Any], tokenizer: Any) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED], skip_special_tokens=False)
