"""Which settings nobody read during a run: a setting without effect is one that its user is wrong about."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from finetune.provenance.config_trace import typed

if TYPE_CHECKING:
    from finetune.config import RunConfig


class UnreadSetting(UserWarning):
    """A run ended and nothing had read these settings. The tests turn it into an error."""


@dataclass(frozen=True)
class Rule:
    """Why settings may stay unread.

    Attributes:
        keys: Dotted keys, or what all of them begin with; ``*`` stands for a segment that users name.
        when: Given the whole configuration and the part that holds the key.
        why: The reason, said to whoever typed such a setting; ``{part.steps}`` stands for the value of another one beside it.
    """

    keys: tuple[str, ...]
    when: Callable[[RunConfig, Any], bool]
    why: str

    def covers(self, key: str) -> bool:
        """Whether the rule is about a key."""
        return any(_begins(key.split("."), one.split(".")) for one in self.keys)


def _begins(key: list[str], wanted: list[str]) -> bool:
    return len(key) >= len(wanted) and all(one in ("*", other) for one, other in zip(wanted, key, strict=False))


def elsewhere(config: RunConfig, part: Any) -> bool:
    """Read before the run, or by an earlier one: what was typed had its effect there."""
    return True


def unforeseen(config: RunConfig, part: Any) -> bool:
    """Only the run shows whether it is read."""
    return True


def _from_hub(config: RunConfig) -> bool:
    return bool(config.data.hub) or any(source.hub for source in config.data.sources.values())


def _rounds_again(config: RunConfig) -> bool:
    """An export is quantized with the run's own settings."""
    return any(export.format == "bitsandbytes" for export in config.export.values())


BY_DESIGN = (
    Rule(("run.if_exists",), elsewhere, "nothing stood there to decide about: only runs in a new folder are looked at"),
    Rule(("model.architecture",), elsewhere, "each family's closed form reads the dimensions that it has"),
    Rule(
        ("quantization.threshold",),
        lambda c, part: part.method != "int8" and not _rounds_again(c),
        "it is LLM.int8's, and quantization.method={part.method}",
    ),
    Rule(
        ("quantization.bits", "quantization.group_size"),
        lambda c, part: part.method != "hqq",
        "it is hqq's, and quantization.method={part.method}",
    ),
    Rule(
        ("quantization.double",),
        lambda c, part: part.method not in ("nf4", "fp4") and not _rounds_again(c),
        "it is for nf4 and fp4, and quantization.method={part.method}",
    ),
    Rule(("quantization.skip_modules",), lambda c, part: part.method == "none", "nothing is quantized"),
    Rule(("quantization.skip_modules_tokens",), lambda c, part: not part.skip_modules_mib, "quantization.skip_modules_mib=0 measures nothing"),
    Rule(
        ("lora.calibration_tokens",),
        lambda c, part: part.variant != "eva",
        "it is EVA's, and lora.variant={part.variant}",
    ),
    Rule(
        ("data.heldout_share", "data.heldout_rows"),
        lambda c, part: part.heldout_path is not None,
        "data.heldout_path={part.heldout_path} names the held-out rows",
    ),
    Rule(
        ("data.heldout_share",),
        lambda c, part: part.heldout_rows is not None,
        "data.heldout_rows={part.heldout_rows} is set",
    ),
    Rule(("data.revision", "data.streaming"), lambda c, part: not _from_hub(c), "no data come from the hub"),
    Rule(("data.pack_tokens",), lambda c, part: not part.packing, "data.packing=false"),
    Rule(("data.checks.largest_label_share",), unforeseen, "compared only where answers repeat like labels"),
    Rule(("data.checks.overlap_share",), unforeseen, "compared only where rows are held out"),
    Rule(("train.epochs",), lambda c, part: part.steps is not None, "train.steps={part.steps} is set"),
    Rule(("train.preference",), lambda c, part: c.train.objective == "sft", "train.objective=sft compares no answers"),
    Rule(
        ("train.preference.label_smoothing",),
        lambda c, part: part.loss != "sigmoid",
        "DPO's own loss alone smooths labels",
    ),
    Rule(
        ("optim.decay",), lambda c, part: part.schedule != "wsd", "optim.schedule={part.schedule} has no end of its own"
    ),
    Rule(
        ("optim.warmup", "optim.warmup_tokens"),
        lambda c, part: part.warmup_steps is not None,
        "optim.warmup_steps={part.warmup_steps} is set",
    ),
    Rule(
        ("optim.warmup",),
        lambda c, part: part.warmup_tokens is not None,
        "optim.warmup_tokens={part.warmup_tokens} is set",
    ),
    Rule(
        ("preflight.rows", "preflight.steps"),
        elsewhere,
        "a rehearsal that held is remembered; the run that made it read them",
    ),
    Rule(
        (
            "eval.harness.include_path",
            "eval.harness.limit",
            "eval.harness.shots",
            "eval.harness.chat",
            "eval.harness.batch_rows",
        ),
        lambda c, part: not c.eval.harness.tasks,
        "no task of lm-eval is asked for",
    ),
    Rule(
        ("launch.nodes", "launch.node", "launch.host", "launch.port", "launch.heartbeat_timeout_seconds", "launch.grace_seconds"),
        elsewhere,
        "the launcher reads them before the run",
    ),
    Rule(("sweep",), elsewhere, "what starts the jobs reads it, not the jobs"),
    Rule(("export.*.shard_bytes",), lambda c, part: part.format != "safetensors", "only its files are cut"),
    Rule(("eval.max_new_tokens", "eval.batch_rows"), lambda c, part: part.rows == 0, "no answers are written"),
    Rule(
        (
            "export.*.logit_rows",
            "export.*.loss_rows",
            "export.*.rows",
            "export.*.max_logit_difference",
            "export.*.max_kl",
            "export.*.max_new_tokens",
        ),
        lambda c, part: part.format in ("card", "hub"),
        "they write no weights that could be compared",
    ),
    Rule(
        ("export.*.repository", "export.*.private", "export.*.push"),
        lambda c, part: part.format != "hub",
        "nothing is sent",
    ),
    Rule(("export.*.dtype",), lambda c, part: not part.dtype, "left to the format, which may have a single dtype"),
    Rule(
        ("tracking.*",),
        lambda c, part: part.kind == "tensorboard",
        "files beside the run: no service, no project, nothing to send",
    ),
    Rule(
        (
            "hardware.gpus",
            "hardware.gpu_name",
            "hardware.gpu_memory_bytes",
            "hardware.gpu_capability",
            "hardware.ram_bytes",
        ),
        lambda c, part: part.name == "auto",
        "they describe a machine to plan for",
    ),
)
"""Settings of what a run did not choose. A key that no rule here explains has to be read, or to go; so has one that was typed."""


class _Watched:
    """Stands for one field of one config object until the first real reading, then takes itself away.

    So each later reading is the dataclass's own slot: a hot loop pays nothing.
    """

    def __init__(self, slot: Any, name: str) -> None:
        self.slot = slot
        self.name = name

    def __get__(self, owner: Any, kind: type) -> Any:
        value = self.slot.__get__(owner, kind)
        if not _is_bookkeeping(sys._getframe(1)) and self.name in vars(kind):
            delattr(kind, self.name)
        return value

    def __set__(self, owner: Any, value: Any) -> None:
        self.slot.__set__(owner, value)


def watch(config: RunConfig) -> None:
    """From now on, every field of the configuration remembers whether somebody read it."""
    for _, part in list(_parts(config)):
        base = _plain_kind(part)
        fields = {field.name: _Watched(getattr(base, field.name), field.name) for field in dataclasses.fields(part)}
        # One class for each object, since two exports share a dataclass and each has keys of its own.
        part.__class__ = type(
            base.__name__, (base,), {"__slots__": (), "__module__": base.__module__, "__reduce__": _unwatched, **fields}
        )


def idle(config: RunConfig, overrides: Sequence[str]) -> list[str]:
    """What was typed and cannot have an effect beside the other settings, one sentence each; known before the run."""
    words = typed(overrides)
    found = [
        (word, rule, part)
        for key, part in _keys(config)
        if (word := _word(key, words)) and (rule := _rule(config, part, key))
    ]
    return [
        f"{word} has no effect: {rule.why.format(part=part)}"
        for word, rule, part in found
        if rule.when not in (elsewhere, unforeseen)
    ]


def tell_idle(config: RunConfig, overrides: Sequence[str]) -> None:
    """Warns, when a run begins, of what its user typed in vain."""
    for sentence in idle(config, overrides):
        warnings.warn(UnreadSetting(sentence), stacklevel=2)


def unread(config: RunConfig, overrides: Sequence[str] = ()) -> list[str]:
    """Dotted keys of a watched configuration that nothing has read.

    Those that `BY_DESIGN` explains are left out, unless they were typed and only the run could show it.
    """
    words, found = typed(overrides), []
    for key, part in _keys(config):
        if isinstance(vars(type(part)).get(key.rpartition(".")[2]), _Watched):
            rule = _rule(config, part, key)
            if rule is None or (rule.when is unforeseen and _word(key, words)):
                found.append(key)
    return found


def tell_unread(config: RunConfig, overrides: Sequence[str]) -> None:
    """Warns of the settings that a whole run did not read."""
    keys = unread(config, overrides)
    if keys:
        warnings.warn(
            UnreadSetting(f"nothing read {', '.join(keys)} during this run: setting it had no effect"), stacklevel=2
        )


def _rule(config: RunConfig, part: Any, key: str) -> Rule | None:
    return next((rule for rule in BY_DESIGN if rule.covers(key) and rule.when(config, part)), None)


def _word(key: str, words: dict[str, str]) -> str | None:
    """What was typed of a key, or of one inside it that the user named."""
    return next((word for name, word in words.items() if name == key or name.startswith(f"{key}.")), None)


def _keys(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Each setting's dotted key, with the config object that holds it."""
    for prefix, part in _parts(config):
        for field in dataclasses.fields(part):
            if not _holds_parts(_peek(part, field.name)):
                yield f"{prefix}{field.name}", part


def _parts(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each config object of the tree with its dotted prefix. Reading the tree here is no reading."""
    yield prefix, config
    for field in dataclasses.fields(config):
        value = _peek(config, field.name)
        for name, part in value.items() if isinstance(value, dict) else [("", value)]:
            if dataclasses.is_dataclass(part):
                yield from _parts(part, f"{prefix}{field.name}.{name}." if name else f"{prefix}{field.name}.")


def _peek(config: Any, name: str) -> Any:
    found = vars(type(config)).get(name)
    return found.slot.__get__(config) if isinstance(found, _Watched) else getattr(config, name)


def _is_bookkeeping(reader: FrameType) -> bool:
    """Writing all of it down is no reading: config.yaml, manifests, fingerprints, copies, comparisons. Nor are the rules here."""
    module = reader.f_globals.get("__name__", "")
    code = reader.f_code
    written = module == "finetune.run" and code.co_qualname.startswith("plain")
    return (
        written
        or module == __name__
        or module.partition(".")[0] in ("omegaconf", "dataclasses")
        or code.co_filename == "<string>"
    )


def _unwatched(config: Any) -> tuple[Any, ...]:
    """For pickling and copying: the plain dataclass. What goes to another process counts as read, since nobody sees what it does there."""
    return _rebuilt, (
        _plain_kind(config),
        {field.name: getattr(config, field.name) for field in dataclasses.fields(config)},
    )


def _plain_kind(part: Any) -> type:
    """The dataclass itself, whether or not it is watched already: a replay runs twice on one configuration."""
    kind = type(part)
    return kind.__mro__[1] if vars(kind).get("__reduce__") is _unwatched else kind


def _rebuilt(kind: Any, fields: dict[str, Any]) -> Any:
    return kind(**fields)


def _holds_parts(value: Any) -> bool:
    """Whether a field holds config objects, whose own fields are looked at instead."""
    values = list(value.values()) if isinstance(value, dict) else [value]
    return bool(values) and all(dataclasses.is_dataclass(one) for one in values)
