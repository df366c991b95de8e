"""Finds settings that a run never reads, which are dead code: ``python -m tests.provenance.read_tracking OVERRIDES``.

Every field of the configuration remembers whether something read it. Settings without an effect (``unused()``) are left
out, and so are those of `READ_ELSEWHERE` and `KNOWN_AFTER_RUN`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from finetune.provenance.config_trace import typed
from finetune.provenance.unused import override_of, unused_settings

if TYPE_CHECKING:
    from finetune.config import RunConfig

UNREAD = "settings that nothing read:"
READ_ELSEWHERE = (
    "run.if_exists",  # read only where the folder exists
    "model.architecture",  # each family's closed form reads the dimensions that it has
    "preflight.rows",
    "preflight.steps",  # a preflight that passed is remembered; the run that made it read them
    "launch.nodes",
    "launch.node",
    "launch.host",
    "launch.port",
    "launch.heartbeat_timeout_seconds",
    "launch.grace_seconds",  # the launcher reads these
    "sweep",  # what starts the jobs reads it
)
KNOWN_AFTER_RUN = (
    "data.checks.largest_label_share",  # compared only where answers repeat like labels
    "data.checks.overlap_share",  # compared only where rows are held out
)
"""Whether these are read depends on the rows; they must be where a user typed them."""


class _TrackedField:
    """A descriptor that records the first read of one config field and then removes itself.

    Later reads use the dataclass's own slot, so that a hot loop costs nothing.
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


def track_reads(config: RunConfig) -> None:
    """Makes every field of the configuration remember whether it was read."""
    for _, part in list(_parts(config)):
        base = _plain_type(part)
        fields = {
            field.name: _TrackedField(getattr(base, field.name), field.name) for field in dataclasses.fields(part)
        }
        # One class for each object, since two exports share a dataclass and each has keys of its own.
        part.__class__ = type(
            base.__name__, (base,), {"__slots__": (), "__module__": base.__module__, "__reduce__": _untracked, **fields}
        )


def unread_settings(config: RunConfig, overrides: Sequence[str] = ()) -> list[str]:
    """Returns the dotted keys of a tracked configuration that nothing has read and that should have been."""
    words = typed(overrides)
    unread = [
        key
        for key, part in _keys(config)
        if isinstance(vars(type(part)).get(key.rpartition(".")[2]), _TrackedField)
        and not (_is_in(key, KNOWN_AFTER_RUN) and not override_of(key, words))
    ]
    excused = [*READ_ELSEWHERE, *(key for key, _ in _unused(config))]
    return [key for key in unread if not _is_in(key, excused)]


def _unused(config: RunConfig) -> list[tuple[str, str]]:
    """The settings without effect, from a copy: looking must not count as reading."""
    import copy

    return list(unused_settings(copy.deepcopy(config)))


def _is_in(key: str, keys: Sequence[str]) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def _keys(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Each setting's dotted key, with the config object that holds it."""
    for prefix, part in _parts(config):
        for field in dataclasses.fields(part):
            if not _holds_parts(_peek(part, field.name)):
                yield f"{prefix}{field.name}", part


def _parts(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each config object of the tree with its dotted prefix."""
    yield prefix, config
    for field in dataclasses.fields(config):
        value = _peek(config, field.name)
        for name, part in value.items() if isinstance(value, dict) else [("", value)]:
            if dataclasses.is_dataclass(part):
                yield from _parts(part, f"{prefix}{field.name}.{name}." if name else f"{prefix}{field.name}.")


def _peek(config: Any, name: str) -> Any:
    value = vars(type(config)).get(name)
    return value.slot.__get__(config) if isinstance(value, _TrackedField) else getattr(config, name)


def _is_bookkeeping(reader: FrameType) -> bool:
    """Whether the configuration is only written down: config.yaml, manifests, fingerprints, copies, comparisons."""
    module = reader.f_globals.get("__name__", "")
    code = reader.f_code
    return (
        (module == "finetune.jsonable" and code.co_qualname == "_json_fields")
        or module == __name__
        or module.partition(".")[0] in ("omegaconf", "dataclasses")
        or code.co_filename == "<string>"
    )


def _untracked(config: Any) -> tuple[Any, ...]:
    """For pickling and copying: the plain dataclass. What goes to another process counts as read there."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return _rebuilt, (_plain_type(config), values)


def _plain_type(part: Any) -> type:
    kind = type(part)
    return kind.__mro__[1] if vars(kind).get("__reduce__") is _untracked else kind


def _rebuilt(kind: Any, fields: dict[str, Any]) -> Any:
    return kind(**fields)


def _holds_parts(value: Any) -> bool:
    values = list(value.values()) if isinstance(value, dict) else [value]
    return bool(values) and all(dataclasses.is_dataclass(part) for part in values)


def main(overrides: list[str]) -> None:
    """Does a whole run and prints the settings that it did not read."""
    from finetune.config import load
    from finetune.launch import Ranks
    from finetune.pipeline import run

    config = load(overrides)
    track_reads(config)
    run(config, overrides=overrides, ranks=Ranks({}))
    sys.stdout.write(f"{UNREAD} {unread_settings(config, overrides)}\n")


if __name__ == "__main__":
    from tests.provenance import read_tracking  # one copy of the classes, whatever the module is called when it is run

    read_tracking.main(sys.argv[1:])
