"""The tracking group: ``tracking=[wandb]``, ``tracking=[]``, ``tracking=[wandb,tensorboard]``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec

from finetune.errors import ConfigError

SERVICES = {
    "mlflow": "mlflow",
    "trackio": "trackio",
    "comet_ml": "comet-ml",
    "clearml": "clearml",
    "swanlab": "swanlab",
    "aim": "aim",
    "dvclive": "dvclive",
}
"""Trackers that accelerate knows, each a module, with the package that has it."""

SENDS_FILES = ("mlflow",)

KINDS = ("wandb", "tensorboard", *SERVICES)
MODES = ("auto", "online", "offline")


@dataclass(kw_only=True, slots=True)
class TrackerConfig:
    """Configures one service that receives config, metrics, report and adapter."""

    kind: str
    """``wandb``, ``tensorboard``, or a tracker of accelerate: ``mlflow``, ``trackio``, ``comet_ml``, ``clearml``,
    ``swanlab``, ``aim``, ``dvclive``. The latter read their keys and addresses from their own variables."""

    project: str
    """Project of the service that the run belongs to."""

    mode: str
    """Of W&B. ``auto``: online if there is a key, else off; ``offline`` writes to the run folder; ``online`` needs the
    key."""

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
        if self.kind in SERVICES:
            yield from ((name, f"{self.kind} reads its own variables") for name in ("mode", "entity", "group", "tags"))
            if self.kind not in SENDS_FILES:
                yield "artifacts", f"accelerate's tracker of {self.kind} sends figures only"

    def problems(self) -> Iterator[str]:
        if self.kind not in KINDS:
            yield f"tracking.{self.kind}.kind must be one of {', '.join(KINDS)}; got {self.kind!r}"
        if self.mode not in MODES:
            yield f"tracking.{self.kind}.mode must be one of {', '.join(MODES)}; got {self.mode!r}"
        if not self.project.strip():
            yield f"tracking.{self.kind}.project is empty; name one, e.g. finetune"


def check_trackers(config: Mapping[str, TrackerConfig]) -> None:
    """Checks that the packages of the chosen services are installed.

    Raises:
        ConfigError: One is not.
    """
    for name in config:
        if name in SERVICES and find_spec(name) is None:
            raise ConfigError(
                f"tracking.{name} needs the package {SERVICES[name]}, which is not installed: pip install "
                f"{SERVICES[name]}, or leave {name} out of tracking="
            )
