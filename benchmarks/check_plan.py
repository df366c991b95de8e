"""Compares the plan's closed form with published memory figures: ``python -m benchmarks.check_plan FILE [--rows]``.

FILE holds {"rows": [...]}. Prints each source's median and 90th-percentile error, and ends with one line of JSON. Rows
that the plan has no figure for are named and not counted.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.published_figures import Comparison, compare, compare_run, unplanned
from finetune.architecture import ArchitectureConfig
from finetune.config import load
from finetune.hardware import probe
from finetune.plan.inputs import PlanInputs
from finetune.plan.settings import from_config

MODELS = Path(__file__).parents[1] / "conf" / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", action="store_true", help="print every row")
    arguments = parser.parse_args()
    rows = []
    for row in read(arguments.file, parser):
        why = None if "overrides" in row else unplanned(row)
        if why:
            print(f"row {row.get('id')} is left out: {why}")
        else:
            rows.append(row)
    known = architectures()
    compared = [compare_run(row, inputs_of(row)) if "overrides" in row else compare(row, known) for row in rows]
    if arguments.rows:
        for row, comparison in zip(rows, compared, strict=True):
            print(row_text(row["model"], row["note"] if "overrides" in row else row["method"], comparison))
    for source in sorted({comparison.source for comparison in compared}):
        print(summary(source, [c for c in compared if c.source == source]))
    without_libraries = sorted(c.error_without_libraries for c in compared if c.error_without_libraries is not None)
    if without_libraries:
        print(f"{'of these, without the libraries':<55}{len(without_libraries):>4} rows  {figures(without_libraries)}")
    print(summary("every condition known", [c for c in compared if c.known]))
    print(summary("all", compared))
    print(json.dumps(verdict(compared)))


def read(file: Path, parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """Reads the rows; a file in another form ends the script with a message and exit code 2."""
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        parser.error(f'{file} must hold {{"rows": [...]}} as JSON; {type(error).__name__}: {error}')
    return rows


def inputs_of(row: Mapping[str, Any]) -> PlanInputs:
    """Plans a row of benchmarks/measure_plan.py, which lists its settings as a user types them."""
    config = load([*row["overrides"], "run.name=compared"])
    return from_config(config, probe(config.hardware))


def architectures() -> dict[str, ArchitectureConfig]:
    """Returns every shipped model's dimensions by option name."""
    models = {}
    for file in sorted(MODELS.glob("*.yaml")):
        option = OmegaConf.to_container(OmegaConf.load(file))
        assert isinstance(option, dict)
        if option.get("architecture"):
            models[file.stem] = ArchitectureConfig(**option["architecture"])
    return models


def errors(compared: Sequence[Comparison]) -> list[float]:
    return sorted(c.error for c in compared if c.error is not None)


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the percentile by nearest rank, so that the figure belongs to a row."""
    return values[min(len(values) - 1, int(share * len(values)))]


def summary(name: str, compared: Sequence[Comparison]) -> str:
    relative = errors(compared)
    verdicts = [c.fits == c.planned_fits for c in compared if c.fits is not None]
    right = f"  fits right {sum(verdicts)}/{len(verdicts)}" if verdicts else ""
    return f"{name:<55}{len(compared):>4} rows  {figures(relative) if relative else '':27}{right}"


def figures(relative: Sequence[float]) -> str:
    return f"median {statistics.median(relative):6.1%}  p90 {percentile(relative, 0.9):6.1%}"


def row_text(model: str, method: str, c: Comparison) -> str:
    reported = f"{c.reported_bytes / 1e9:8.2f}" if c.reported_bytes else " " * 8
    signed = f"{c.planned_bytes / c.reported_bytes - 1:+7.1%}" if c.reported_bytes else " " * 7
    fits = f"  fits {c.fits} planned {c.planned_fits}" if c.fits is not None else ""
    return f"{c.row:>4} {model:<24}{method:<36}{reported} {c.planned_bytes / 1e9:8.2f} GB {signed}{fits}"


def verdict(compared: Sequence[Comparison]) -> dict[str, float | int]:
    relative = errors(compared)
    verdicts = [c.fits == c.planned_fits for c in compared if c.fits is not None]
    return {
        "rows": len(compared),
        "median_error": round(statistics.median(relative), 4),
        "p90_error": round(percentile(relative, 0.9), 4),
        "fit_verdicts_right": round(sum(verdicts) / len(verdicts), 4) if verdicts else 1.0,
    }


if __name__ == "__main__":
    main()
