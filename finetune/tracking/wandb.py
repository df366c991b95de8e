"""Weights & Biases, online or offline. It gets the figures, config and files of the run and collects nothing itself."""

from __future__ import annotations

import json
import netrc
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from finetune.console import log
from finetune.run import write_json
from finetune.tracking.config import TrackerConfig
from finetune.tracking.trackers import Figures, TrackerError

if TYPE_CHECKING:
    import wandb

REACH_SECONDS = 5.0
START_SECONDS = 30.0
FINISH_SECONDS = 120.0
"""How long a service may delay the start of the tracking and the end of a run."""

Mode = Literal["online", "offline", "off"]
DEFAULT_URL = "https://api.wandb.ai"


class WeightsAndBiases:
    """Tracker with one W&B run for one run folder.

    ``tracking/wandb.json`` holds the id, so that a resumed run continues the same W&B run.
    """

    name, is_service = "wandb", True

    def __init__(self, config: TrackerConfig) -> None:
        self.config = config

    def start(self, *, run_name: str, run_config: dict[str, Any], folder: Path) -> None:
        mode, reason = choose_mode(self.config.mode)
        self.run_name = run_name
        if mode == "online":
            try:
                _check_reachable(_base_url())
                self.run = self._init(run_config, folder=folder, mode="online")
            except TrackerError as error:
                mode, reason = "offline", f"{error} ({reason})"
                _stop_helper()
        if mode == "offline":
            self.run = self._init(run_config, folder=folder, mode="offline")
            command = f"wandb sync {self.run.dir.removesuffix('/files')}"
            log("tracking", f"wandb: offline, because {reason}; to send it later: {command}")
        else:
            log("tracking", f"wandb: online, because {reason}: {self.run.url}")

    def _init(self, run_config: dict[str, Any], *, folder: Path, mode: Literal["online", "offline"]) -> wandb.Run:
        import wandb

        config = self.config
        with _tracker_errors():
            run = wandb.init(
                project=config.project,
                entity=config.entity,
                group=config.group,
                tags=config.tags or None,
                name=self.run_name,
                id=_run_id(folder / "wandb.json", run_name=self.run_name),
                resume="allow" if mode == "online" else None,  # offline there is nothing to resume; W&B would warn
                mode=mode,
                dir=str(folder),
                config=run_config,
                settings=_settings(),
                reinit="create_new",
            )
            # A step axis of our own: steps repeat after a resumption, and W&B's own axis drops repeated ones.
            run.define_metric("step", hidden=True)
            run.define_metric("*", step_metric="step")
        return run

    def log(self, step: int, metrics: Figures) -> None:
        with _tracker_errors():
            self.run.log({"step": step, **metrics})

    def summary(self, metrics: Figures) -> None:
        with _tracker_errors():
            self.run.summary.update(dict(metrics))

    def artifact(self, path: Path, *, name: str, kind: str) -> None:
        if not self.config.artifacts:
            return
        import wandb

        with _tracker_errors():
            artifact = wandb.Artifact(_slug(f"{self.run_name}-{name}"), type=kind)
            # Immutable and without cache: W&B reads the file in place instead of copying it to the home folder.
            if path.is_dir():
                artifact.add_dir(str(path), policy="immutable", skip_cache=True)
            else:
                artifact.add_file(str(path), policy="immutable", skip_cache=True)
            self.run.log_artifact(artifact)

    def finish(self) -> None:
        with _tracker_errors():
            self.run.finish()
            _stop_helper()


def choose_mode(setting: str) -> tuple[Mode, str]:
    """Returns ``online``, ``offline`` or ``off``, and why. W&B's own WANDB_MODE takes precedence over ``auto``.

    Without a key nothing goes online, even if requested: W&B would stop the run and ask for one.
    """
    requests = [(setting, "tracking.wandb.mode"), (os.environ.get("WANDB_MODE"), "WANDB_MODE")]
    known = ("online", "offline", "disabled")
    mode, source = next((request for request in requests if request[0] in known), ("auto", ""))
    if mode == "disabled":
        return "off", f"{source}=disabled"
    if mode == "offline":
        return "offline", f"{source}=offline"
    reason = _key_source()
    if reason:
        return "online", f"{source}=online" if mode == "online" else reason
    missing = "there is no WANDB_API_KEY and nobody is logged in"
    return ("offline", f"{source}=online, but {missing}") if mode == "online" else ("off", missing)


def _key_source() -> str:
    """Returns where W&B finds its key; empty if there is none."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY is set"
    host = urlsplit(_base_url()).hostname or ""
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        is_logged_in = netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return ""
    return f"this user is logged in to {host}" if is_logged_in else ""


def _base_url() -> str:
    return os.environ.get("WANDB_BASE_URL", DEFAULT_URL)


def _check_reachable(url: str) -> None:
    """Checks that the server responds: W&B's own start would retry for half a minute first."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        raise TrackerError(f"{url} cannot be reached") from error


def _stop_helper() -> None:
    """Stops W&B's helper process, which holds the id of a run that could not start."""
    import wandb

    wandb.teardown()


def _run_id(file: Path, *, run_name: str) -> str:
    """Returns the W&B run's id: the run's name with a random end, since a project may hold many runs of one name."""
    if not file.is_file():
        write_json(file, {"id": f"{_slug(run_name)[:48]}-{secrets.token_hex(4)}"})
    return json.loads(file.read_text(encoding="utf-8"))["id"]


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def _settings() -> wandb.Settings:
    """Turns off console, code, git, host and packages: only what the run sends leaves the machine."""
    import wandb

    return wandb.Settings(
        console="off",
        silent=True,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
        host="",
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        x_save_requirements=False,
        init_timeout=START_SECONDS,
        finish_timeout=FINISH_SECONDS,
    )


@contextmanager
def _tracker_errors() -> Iterator[None]:
    """Turns what W&B raises when the service or its helper process is gone into `TrackerError`."""
    import wandb
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError
    from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

    try:
        yield
    except (wandb.Error, OSError, HandleAbandonedError, MailboxClosedError, ServerResponseError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TrackerError(f"W&B refuses the call ({lines[0]})") from error
