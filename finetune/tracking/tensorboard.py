"""Writes TensorBoard's event files with torch."""

import json
from pathlib import Path
from typing import Any

from finetune.console import log
from finetune.tracking.config import TrackerConfig
from finetune.tracking.trackers import Figures, TrackerError


class TensorBoard:
    """Tracker that writes to ``tracking/tensorboard``; a resumed run adds a second file there."""

    name, is_service = "tensorboard", False

    def __init__(self, config: TrackerConfig) -> None:
        self.config = config

    def start(self, *, run_name: str, run_config: dict[str, Any], folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrackerError("the package tensorboard is not installed; run: pip install tensorboard") from error
        self.writer: Any = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", f"```\n{json.dumps(run_config, indent=2)}\n```")
        log("tracking", f"tensorboard: tensorboard --logdir {folder / 'tensorboard'}")

    def log(self, step: int, metrics: Figures) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def summary(self, metrics: Figures) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, 0)

    def artifact(self, path: Path, *, name: str, kind: str) -> None:
        self.writer.add_text(name, f"{kind}: {path}")

    def finish(self) -> None:
        self.writer.close()
