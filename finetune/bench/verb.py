"""The verb: `finetune bench <what> key=value ...`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.console import log
from finetune.errors import ConfigError

Settings = dict[str, str]
QUICKSTART = "smollm2_135m"
"""The quickstart's option of the model group."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Something to measure.

    Attributes:
        about: What is measured.
        run: Takes the settings that the user gave.
        takes: Names of the settings.
        needs: Those that must be given.
    """

    about: str
    run: Callable[[Settings], None]
    takes: tuple[str, ...]
    needs: tuple[str, ...] = ()


def bench(arguments: Sequence[str]) -> None:
    """Runs one measurement, or with ``--help`` says which there are and what they take.

    Raises:
        ConfigError: There is no such measurement, or a setting is missing or unknown.
    """
    if "--help" in arguments:
        log("bench", *[_explained(name) for name in BENCHES if name in arguments or not set(BENCHES) & set(arguments)])
        return
    if not arguments or arguments[0] not in BENCHES:
        raise ConfigError(
            f"bench: say what to measure, one of {', '.join(BENCHES)}; got {' '.join(arguments) or 'nothing'}"
        )
    what, measurement = arguments[0], BENCHES[arguments[0]]
    settings = dict(argument.split("=", 1) for argument in arguments[1:] if "=" in argument)
    wrong = [
        argument
        for argument in arguments[1:]
        if argument.split("=", 1)[0] not in measurement.takes or "=" not in argument
    ]
    if wrong:
        takes = ", ".join(f"{name}=..." for name in measurement.takes)
        raise ConfigError(f"bench {what}: {', '.join(wrong)}: there is no such setting; it takes {takes}")
    missing = [name for name in measurement.needs if name not in settings]
    if missing:
        raise ConfigError(f"bench {what}: {', '.join(missing)} is missing; {NEEDED[missing[0]]}")
    measurement.run(settings)


def _explained(name: str) -> str:
    measurement = BENCHES[name]
    settings = [f"{key}=" if key in measurement.needs else f"[{key}=]" for key in measurement.takes]
    return f"{' '.join([name, *settings])}: {measurement.about}"


def _data(settings: Settings) -> None:
    from finetune.bench.data import compare_data_preparation

    rows = _whole(settings, "data", "rows", 100_000)
    compare_data_preparation(
        Path(settings["source"]), tokenizer=settings.get("tokenizer") or quickstart_tokenizer(), rows=rows
    )


def _speed(settings: Settings) -> None:
    from finetune.bench.speed import compare_training_speed

    if settings.get("against", "trl") != "trl":
        raise ConfigError(
            f"bench speed: against must be trl, or left out to compare the speed options; got {settings['against']}"
        )
    compare_training_speed(
        Path(settings["source"]), rows=_whole(settings, "speed", "rows", 128), against=settings.get("against"),
        repeats=_whole(settings, "speed", "repeats", 1),
    )  # fmt: skip


def _start(settings: Settings) -> None:
    from finetune.bench.start import measure_start

    measure_start(repeats=_whole(settings, "start", "repeats", 3))


def _quantization(settings: Settings) -> None:
    from finetune.bench.quantization import OptionalMeasurements, compare_backends
    from finetune.paths import SHIPPED

    if "task" in settings and "metric" not in settings:
        raise ConfigError("bench quantization: task needs metric, which judges its answers, e.g. metric=label")
    compare_backends(
        model=settings.get("model", QUICKSTART),
        text=Path(settings.get("text") or SHIPPED / "general.txt"),
        tokens=_whole(settings, "quantization", "tokens", 2048),
        grid=_grid(settings, "quantization"),
        out=Path(settings.get("out", "outputs/quantization.html")),
        backends=_names(settings),
        optional=OptionalMeasurements(
            repeats=0 if settings.get("repeats") == "0" else _whole(settings, "quantization", "repeats", 3),
            task=Path(settings["task"]) if "task" in settings else None,
            metric=settings.get("metric", ""),
            rows=_whole(settings, "quantization", "rows", 32),
            max_new_tokens=_whole(settings, "quantization", "max_new_tokens", 256),
            humaneval=Path(settings["humaneval"]) if "humaneval" in settings else None,
            problems=_whole(settings, "quantization", "problems", 164),
        ),
    )


def _tuning(settings: Settings) -> None:
    from finetune.bench.tuning import TuningBudget, compare_tuning

    compare_tuning(
        source=Path(settings["source"]) if "source" in settings else None,
        rows=_whole(settings, "tuning", "rows", 64),
        heldout=_whole(settings, "tuning", "heldout", 64),
        model=settings.get("model", QUICKSTART),
        grid=_grid(settings, "tuning"),
        backends=_names(settings),
        budget=TuningBudget(
            steps=_whole(settings, "tuning", "steps", 24),
            learning_rate=number(settings.get("learning_rate", "1e-3"), "bench tuning: learning_rate"),
            seeds=_whole(settings, "tuning", "seeds", 3),
            metric=settings.get("metric", "" if "source" in settings else "json_fields"),
            max_new_tokens=_whole(settings, "tuning", "max_new_tokens", 48),
        ),
        out=Path(settings.get("out", "outputs/tuning.json")),
    )


def _grid(settings: Settings, what: str) -> str:
    """The quickstart's model comes from a 4-bit file, so it alone is moved off that file's grid unless asked for."""
    grid = settings.get("grid", "as_it_is" if "model" in settings else "moved")
    if grid not in ("moved", "as_it_is"):
        raise ConfigError(f"bench {what}: grid must be moved or as_it_is; got {grid}")
    return grid


def _names(settings: Settings) -> list[str]:
    return [name for name in settings.get("backends", "").split(",") if name]


def _whole(settings: Settings, what: str, name: str, otherwise: int) -> int:
    value = number(settings.get(name, str(otherwise)), f"bench {what}: {name}")
    if not value.is_integer():
        raise ConfigError(f"bench {what}: {name} must be a whole number; got {settings[name]!r}")
    return int(value)


def _humaneval(settings: Settings) -> None:
    from finetune.eval.humaneval import humaneval, humaneval_sampling

    counts = {
        name: _whole(settings, "humaneval", name, 1) for name in ("problems", "samples", "seed") if name in settings
    }
    text = settings.get("temperature", "0")
    temperature = 0.0 if text == "0" else number(text, "bench humaneval: temperature")
    max_new_tokens = _whole(settings, "humaneval", "max_new_tokens", 512)
    humaneval(
        Path(settings["source"]),
        model=settings["model"],
        sampling=humaneval_sampling(max_new_tokens, temperature),
        quantization=settings.get("quantization", "none"),
        out=Path(settings.get("out", "outputs/humaneval")),
        **counts,
    )


NEEDED = {
    "source": "give a JSON Lines file, such as source=gsm8k/train.jsonl (question and answer) or HumanEval.jsonl.gz",
    "model": "give a .gguf file, a folder, a hub id or an option of the model group, e.g. model=smollm2_135m",
}

BENCHES = {
    "data": Measurement(
        "preparing rows, beside TRL and the bare tokenizer", _data, ("source", "tokenizer", "rows"), needs=("source",)
    ),
    "speed": Measurement(
        "training, an option at a time, or with against=trl beside `trl sft`",
        _speed,
        ("source", "rows", "against", "repeats"),
        needs=("source",),
    ),
    "start": Measurement("from the start of a process to its first step", _start, ("repeats",)),
    "quantization": Measurement(
        "every way to store a base: error, size, loss, speed",
        _quantization,
        (
            "model",
            "text",
            "tokens",
            "grid",
            "out",
            "backends",
            "repeats",
            "task",
            "metric",
            "rows",
            "max_new_tokens",
            "humaneval",
            "problems",
        ),
    ),
    "tuning": Measurement(
        "one task tuned on every kind of base, over seeds",
        _tuning,
        (
            "source",
            "rows",
            "heldout",
            "model",
            "grid",
            "backends",
            "steps",
            "learning_rate",
            "seeds",
            "metric",
            "max_new_tokens",
            "out",
        ),
    ),
    "humaneval": Measurement(
        "problems solved by a model or a GGUF, in a sandbox",
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
    if not 0 < value < math.inf:
        raise ConfigError(f"{where} must be a positive number; got {text!r}")
    return value


def quickstart_tokenizer() -> str:
    """The folder of the quickstart's model, which brings a tokenizer with a chat template."""
    from finetune.config import load
    from finetune.model import fetch

    return str(fetch(load(["+experiment=quickstart"]).model).folder)
