"""Translates the settings of a training file, one by one, and says what it could not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from finetune.config.fields import all_keys, resolve_type, value_problems
from finetune.config.model_option import option_of
from finetune.config.other_names import OTHER_NAMES
from finetune.config.schema import RunConfig
from finetune.convert.data_sets import data_settings
from finetune.convert.read import TRL, TrainingFile
from finetune.convert.tools import DEFAULTS, FULL, REASONS, UNNEEDED
from finetune.objectives import OBJECTIVES
from finetune.paths import CONF

QUANTIZATION = ("load_in_4bit", "load_in_8bit", "quantization_bit", "bnb_4bit_quant_type",
                "bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization", "adapter",
                "finetuning_type", "bnb_config_kwargs")  # fmt: skip
BATCH = (("per_device_train_batch_size", "micro_batch_size"), ("gradient_accumulation_steps",))
LENGTH = (("num_train_epochs", "num_epochs"), ("max_steps",))
COUNTS = {"saves_per_epoch": "train.checkpoints", "evals_per_epoch": "train.evaluations"}
INTERVALS = {"save_strategy": "save_steps", "eval_strategy": "eval_steps", "evaluation_strategy": "eval_steps"}
"""Intervals that are read where their strategy is ``steps``."""

ALIASES = (
    ("num_train_epochs", "num_epochs", "max_steps"), ("warmup_ratio", "warmup_steps"), ("packing", "sample_packing",
    "neat_packing"), ("lora_target", "lora_target_modules", "lora_target_linear"), ("lora_rank", "lora_r", "r"),
    ("lr_scheduler", "lr_scheduler_type"), ("optim", "optimizer"), ("gradient_checkpointing",
    "disable_gradient_checkpointing"), ("max_length", "max_seq_length"),
)  # fmt: skip
"""Names of one setting: where a file has one of them, the tool's default of the others is not its own."""


ON_COMMAND_LINE = ("launch", "export.", "run.if_exists")
"""Settings of one machine or one start; they are typed, and not part of an experiment."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of the experiment: its key, its value, and the words of the other tool that it comes from."""

    key: str
    value: Any
    source: str


@dataclass(slots=True)
class Translation:
    """What became of a training file.

    Attributes:
        file: What was read.
        choices: Options of groups, e.g. ``quantization``.
        settings: Settings with values.
        unneeded: Settings that need no counterpart, each with the reason.
        missing: Settings that were not translated: name, value, reason.
    """

    file: TrainingFile
    choices: list[Setting] = field(default_factory=list)
    settings: list[Setting] = field(default_factory=list)
    unneeded: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, Any, str]] = field(default_factory=list)

    @property
    def translated(self) -> set[str]:
        """Returns the names of the file's settings that were translated."""
        words = {word for item in (*self.choices, *self.settings) for word in re.findall(r"\w+(?=:)", item.source)}
        return words & set(self.file.values)

    def has(self, key: str) -> bool:
        """Returns whether a setting has a value already."""
        return any(item.key == key for item in (*self.choices, *self.settings))


def translate(file: TrainingFile) -> Translation:
    """Translates every setting of a file, and the tool's defaults where the file leaves a setting out."""
    result = Translation(file)
    given = {name: value for name, value in file.values.items() if value not in (None, "", [], {})}
    result.unneeded += [(name, "empty in the file") for name in file.values if name not in given]
    settings = given | _defaults(file, given)
    done = {*_model(result, settings), *_quantization(result, settings), *_batch(result, settings)}
    done |= {*_length(result, settings), *_objective(result, settings), *_data(result, given)}
    for name, value in settings.items():
        if name not in done:
            _one(result, name, value, is_default=name not in given)
    if result.has("optim.warmup_steps"):
        result.settings.append(Setting("optim.warmup", None, "warmup_steps is set"))
    return result


def _defaults(file: TrainingFile, given: dict[str, Any]) -> dict[str, Any]:
    taken = {name for names in ALIASES if set(names) & set(given) for name in names}
    defaults = {name: value for name, value in DEFAULTS[file.tool].items() if name not in {*given, *taken}}
    rank = given.get("lora_rank", defaults.get("lora_rank"))
    if "lora_rank" in DEFAULTS[file.tool] and "lora_alpha" not in given and isinstance(rank, int):
        defaults["lora_alpha"] = 2 * rank
    return defaults


def _source(result: Translation, *names: str, settings: dict[str, Any]) -> str:
    """The words of the file that a setting comes from, and where they are the tool's default."""
    values = result.file.values
    words = [f"{name}: {_short(settings[name])}" for name in names if name in settings]
    if words and not any(values.get(name) is not None for name in names):
        return f"{result.file.tool}'s default, {', '.join(words)}"
    return ", ".join(words)


def _short(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _model(result: Translation, settings: dict[str, Any]) -> Iterator[str]:
    for name in ("base_model", "model_name_or_path"):
        if name in settings:
            option = option_of(str(settings[name]), [CONF])
            item = Setting("model", option, _source(result, name, settings=settings)) if option else None
            result.choices += [item] if item else []
            result.settings += [] if item else [Setting("model.name", str(settings[name]), f"{name}:")]
            yield name


def _quantization(result: Translation, settings: dict[str, Any]) -> Iterator[str]:
    """One option from the several settings that quantize a base; a base that is trained itself has no counterpart."""
    values = {name: settings[name] for name in QUANTIZATION if name in settings}
    bits = str(values.get("quantization_bit", ""))
    kind = str(values.get("bnb_4bit_quant_type", "nf4"))
    double = next((values[name] for name in QUANTIZATION[4:7] if name in values), result.file.tool != TRL)
    if values.get("load_in_4bit") or bits == "4" or values.get("adapter") == "qlora":
        method = kind if kind == "fp4" else "nf4_double" if double else "nf4"
    elif values.get("load_in_8bit") or bits == "8":
        method = "int8"
    else:
        method = "none"
    names = [name for name in values if name != "finetuning_type" or not values]
    result.choices.append(
        Setting("quantization", method, _source(result, *names, settings=settings) or "no 4-bit base")
    )
    trains_base = values.get("finetuning_type") in FULL or (
        result.file.tool != TRL and not {"adapter", "finetuning_type"} & set(values)
    )
    if trains_base or (result.file.tool == TRL and not settings.get("use_peft")):
        name = "finetuning_type" if "finetuning_type" in values else "adapter"
        what = values.get(name, "none")
        result.missing.append((name, what, "the base stays frozen here: an adapter is trained instead"))
    elif "finetuning_type" in values:
        result.unneeded.append(("finetuning_type", "an adapter is what every run trains"))
    yield from values


def _batch(result: Translation, settings: dict[str, Any]) -> Iterator[str]:
    micro = next((name for name in BATCH[0] if name in settings), None)
    accumulation = next((name for name in BATCH[1] if name in settings), None)
    rows, times = settings.get(micro or ""), settings.get(accumulation or "", 1)
    if type(rows) is not int or type(times) is not int:
        return
    assert micro is not None
    source = _source(result, micro, *filter(None, [accumulation]), settings=settings)
    result.settings += [
        Setting("train.micro_batch", rows, _source(result, micro, settings=settings)),
        Setting("train.rows_per_step", rows * times, f"{source}; times your GPUs"),
        Setting("train.tokens_per_step", None, "train.rows_per_step is set"),
    ]
    yield from filter(None, (micro, accumulation))


def _length(result: Translation, settings: dict[str, Any]) -> Iterator[str]:
    """Epochs or steps, and how often is saved and evaluated: counts for the whole run."""
    epochs = next((settings[name] for name in LENGTH[0] if name in settings), None)
    for strategy, name in INTERVALS.items():
        if name in settings and settings.get(strategy, "steps") != "steps":
            result.unneeded.append((name, f"{strategy} is {_short(settings[strategy])}"))
            yield name
    for name, key in COUNTS.items():
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or result.has(key):
            continue
        if isinstance(epochs, int | float):
            count = max(1, round(value * epochs)) if value else 0
        else:
            result.missing.append((name, value, f"{key} counts over the whole run, whose steps are not known here"))
            yield name
            continue
        words = [key for key in (name, *LENGTH[0], *LENGTH[1]) if key in settings]
        result.settings.append(Setting(key, count, _source(result, *words, settings=settings)))
        yield name


def _objective(result: Translation, settings: dict[str, Any]) -> Iterator[str]:
    for name in ("rl", "stage", "method"):
        if name not in settings:
            continue
        value = "sft" if settings[name] == "pt" else str(settings[name])
        yield name
        if value == "sft":
            result.unneeded.append((name, "supervised training is the default"))
        elif value not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            result.missing.append((name, value, f"train.objective has {known}: this file's purpose is not supported"))
        else:
            source = _source(result, name, settings=settings)
            result.choices.append(Setting("train", value, source))
            result.settings.append(Setting("data.objective", OBJECTIVES[value].rows, source))
            if OBJECTIVES[value].reference:
                dropout = _source(result, "lora_dropout", settings=settings)
                result.settings.append(Setting("lora.dropout", 0.0, f"{value} needs it; {dropout or 'not given'}"))
                yield "lora_dropout"


def _data(result: Translation, given: dict[str, Any]) -> Iterator[str]:
    settings, missing, names = data_settings(result.file, given)
    result.settings += [Setting(key, value, source) for key, value, source in settings]
    result.missing += missing
    yield from names


def _one(result: Translation, name: str, value: Any, *, is_default: bool) -> None:
    """Translates a setting that has one counterpart, or says why it has none."""
    is_share = name == "warmup_steps" and isinstance(value, float) and value < 1  # transformers takes a share, too
    other = OTHER_NAMES.get("warmup_ratio" if is_share else name)
    key = other.setting if other else _same_leaf(name)
    here = other.here(value) if other else value
    source = _source(result, name, settings={name: value})
    if key and here is not None and not _fits(key, here):
        here = None
    if name in UNNEEDED and (key is None or here is None or name == "overwrite_output_dir"):
        result.unneeded.append((name, UNNEEDED[name]))
    elif key is None or here is None or key.startswith(ON_COMMAND_LINE):
        if not is_default:
            rule = other.rule if other else "no counterpart here"
            result.missing.append((name, value, REASONS.get(name, "") or rule or f"{key} has no such value"))
    elif not result.has(key):
        target = result.choices if (CONF / key).is_dir() else result.settings
        target.append(Setting(key, here, source))
    elif not is_default:
        result.unneeded.append((name, f"{key} is set already"))


def _fits(key: str, value: Any) -> bool:
    """Whether a value has the type of a setting; options of groups fit."""
    if (CONF / key).is_dir() or key.startswith(("tracking.", "export.")):
        return True
    return not list(value_problems(key, resolve_type(key, RunConfig), value))


@cache
def _same_leaf(name: str) -> str | None:
    """The one setting of this very name."""
    keys = [key for key in all_keys(RunConfig) if key.rpartition(".")[2] == name and "." in key]
    return keys[0] if len(set(keys)) == 1 else None
