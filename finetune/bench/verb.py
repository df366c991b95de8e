"""The verb: `finetune bench <what> key=value ...`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import ConfigError

Settings = dict[str, str]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Something to measure.

    Attributes:
        run: Takes the settings that the user gave.
        takes: Names of the settings.
        needs: Those that must be given.
    """

    run: Callable[[Settings], None]
    takes: tuple[str, ...]
    needs: tuple[str, ...] = ()


def bench(arguments: Sequence[str]) -> None:
    """Runs one measurement.

    Raises:
        ConfigError: There is no such measurement, or a setting is missing or unknown.
    """
    if not arguments or arguments[0] not in BENCHES:
        raise ConfigError(f"bench: say what to measure, one of {', '.join(BENCHES)}; got {' '.join(arguments) or 'nothing'}")
    what, measurement = arguments[0], BENCHES[arguments[0]]
    settings = dict(argument.split("=", 1) for argument in arguments[1:] if "=" in argument)
    wrong = [argument for argument in arguments[1:] if argument.split("=", 1)[0] not in measurement.takes]
    if wrong:
        raise ConfigError(f"bench {what}: {', '.join(wrong)}: there is no such setting; it takes {', '.join(measurement.takes)}")
    missing = [name for name in measurement.needs if name not in settings]
    if missing:
        raise ConfigError(f"bench {what}: {', '.join(missing)} is missing; {NEEDED[missing[0]]}")
    measurement.run(settings)


def _data(settings: Settings) -> None:
    from finetune.bench.data import bench

    rows = int(number(settings.get("rows", "100000"), "bench data: rows"))
    bench(Path(settings["source"]), tokenizer=settings.get("tokenizer") or quickstart_tokenizer(), rows=rows)


def _speed(settings: Settings) -> None:
    from finetune.bench.speed import bench

    if settings.get("against", "trl") != "trl":
        raise ConfigError(f"bench speed: against must be trl, or left out to compare the speed options; got {settings['against']}")
    bench(
        Path(settings["source"]), rows=int(number(settings.get("rows", "128"), "bench speed: rows")), against=settings.get("against"),
        repeats=int(number(settings.get("repeats", "1"), "bench speed: repeats")),
    )  # fmt: skip


def _start(settings: Settings) -> None:
    from finetune.bench.start import bench

    bench(repeats=int(number(settings.get("repeats", "3"), "bench start: repeats")))


def _merge(settings: Settings) -> None:
    from finetune.merge.bench import bench

    bench(parameters=number(settings.get("parameters", "3e9"), "bench merge: parameters"))


def _quantization(settings: Settings) -> None:
    from finetune.bench.lab import compare
    from finetune.paths import SHIPPED

    grid = settings.get("grid", "moved")
    if grid not in ("moved", "as_it_is"):
        raise ConfigError(f"bench quantization: grid must be moved or as_it_is; got {grid}")
    compare(
        text=Path(settings.get("text") or SHIPPED / "general.txt"),
        tokens=int(number(settings.get("tokens", "2048"), "bench quantization: tokens")),
        grid=grid,
        out=Path(settings.get("out", "outputs/quantization.html")),
        backends=[name for name in settings.get("backends", "").split(",") if name],
    )


def _humaneval(settings: Settings) -> None:
    from finetune.eval.humaneval import humaneval

    counts = {name: int(number(settings[name], f"bench humaneval: {name}"))
              for name in ("problems", "samples", "max_new_tokens", "seed") if name in settings}  # fmt: skip
    temperature = settings.get("temperature", "0")
    humaneval(
        Path(settings["source"]),
        model=settings["model"],
        temperature=0.0 if temperature == "0" else number(temperature, "bench humaneval: temperature"),
        quantization=settings.get("quantization", "none"),
        out=Path(settings.get("out", "outputs/humaneval")),
        **counts,
    )


NEEDED = {
    "source": "give a JSON Lines file, e.g. source=gsm8k/train.jsonl (question and answer) or source=HumanEval.jsonl.gz",
    "model": "give a .gguf file, a folder, a hub id or an option of the model group, e.g. model=smollm2_135m",
}

BENCHES = {
    "data": Measurement(_data, ("source", "tokenizer", "rows"), needs=("source",)),
    "speed": Measurement(_speed, ("source", "rows", "against", "repeats"), needs=("source",)),
    "start": Measurement(_start, ("repeats",)),
    "quantization": Measurement(_quantization, ("text", "tokens", "grid", "out", "backends")),
    "merge": Measurement(_merge, ("parameters",)),
    "humaneval": Measurement(
        _humaneval,
        ("source", "model", "problems", "samples", "temperature", "max_new_tokens", "seed", "quantization", "out"),
        needs=("source", "model"),
    ),
}
"""What can be measured."""


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
