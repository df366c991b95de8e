"""The tracking group: ``tracking=[wandb]``, ``tracking=[]``, ``tracking=[wandb,tensorboard]``."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

KINDS = ("wandb", "tensorboard")
MODES = ("auto", "online", "offline")


@dataclass(kw_only=True, slots=True)
class TrackerConfig:
    """Configures one service that receives config, metrics, report and adapter."""

    kind: str
    """``wandb`` or ``tensorboard``."""

    project: str
    """Project of the service that the run belongs to."""

    mode: str
    """``auto`` goes online if there is a key; ``offline`` writes to the run folder; ``online`` needs the key."""

    entity: str | None = None
    """User or team that owns the project; None: the owner of the key."""

    group: str | None = None
    """Name of a group; the service shows its runs together."""

    tags: list[str] = field(default_factory=list)
    """Words to find the run by."""

    artifacts: bool = True
    """Sends the report and the adapter, not only metrics."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yields the settings that have no effect given the others, each with the reason."""
        if self.kind == "tensorboard":
            names = (field.name for field in fields(self) if field.name != "kind")
            yield from ((name, "files in the run folder: no service, no project, nothing to send") for name in names)

    def problems(self) -> Iterator[str]:
        if self.kind not in KINDS:
            yield f"tracking.{self.kind}.kind must be one of {', '.join(KINDS)}; got {self.kind!r}"
        if self.mode not in MODES:
            yield f"tracking.{self.kind}.mode must be one of {', '.join(MODES)}; got {self.mode!r}"
        if not self.project.strip():
            yield f"tracking.{self.kind}.project is empty; name one, e.g. finetune"
