"""The verb: `finetune bench <what> key=value ...`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.errors import ConfigError

BENCHES = {"data": ("source", "tokenizer", "rows"), "merge": ("parameters",), "speed": ("source", "rows", "against", "repeats")}
"""What can be measured, and the settings it takes."""


def bench(arguments: Sequence[str]) -> None:
    """Runs one measurement.

    Raises:
        ConfigError: There is no such measurement, or a setting is missing or unknown.
    """
    if not arguments or arguments[0] not in BENCHES:
        raise ConfigError(f"bench: say what to measure, one of {', '.join(BENCHES)}; got {' '.join(arguments) or 'nothing'}")
    what, names = arguments[0], BENCHES[arguments[0]]
    settings = dict(argument.split("=", 1) for argument in arguments[1:] if "=" in argument)
    wrong = [argument for argument in arguments[1:] if argument.split("=", 1)[0] not in names]
    if wrong:
        raise ConfigError(f"bench {what}: {', '.join(wrong)}: there is no such setting; it takes {', '.join(names)}")
    if what == "merge":
        from finetune.merge.bench import bench as bench_merge

        bench_merge(parameters=number(settings.get("parameters", "3e9"), "bench merge: parameters"))
        return
    if "source" not in settings:
        raise ConfigError(
            f"bench {what}: source is missing; give a JSON Lines file with question and answer, e.g. source=gsm8k/train.jsonl"
        )
    if what == "speed":
        from finetune.bench.speed import bench as bench_speed

        if settings.get("against", "trl") != "trl":
            raise ConfigError(f"bench speed: against must be trl, or left out to compare the speed options; got {settings['against']}")
        bench_speed(
            Path(settings["source"]), rows=int(number(settings.get("rows", "128"), "bench speed: rows")), against=settings.get("against"),
            repeats=int(number(settings.get("repeats", "1"), "bench speed: repeats")),
        )  # fmt: skip
        return
    from finetune.bench.data import bench as bench_data

    rows = int(number(settings.get("rows", "100000"), "bench data: rows"))
    bench_data(Path(settings["source"]), tokenizer=settings.get("tokenizer") or quickstart_tokenizer(), rows=rows)


def number(text: str, where: str) -> float:
    """A positive number that the user typed."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ConfigError(f"{where} must be a positive number; got {text!r}")
    return value


def quickstart_tokenizer() -> str:
    """The folder of the quickstart's model, which brings a tokenizer with a chat template."""
    from finetune.config import load
    from finetune.model import fetch

    return str(fetch(load(["+experiment=quickstart"]).model).folder)
