"""Weights & Biases, offline or online. Takes figures, config and files that it is given, and collects nothing by itself."""

import json
import netrc
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from finetune.console import log
from finetune.run import write_json
from finetune.tracking.config import TrackerConfig
from finetune.tracking.trackers import Figures, TrackerError

REACH_SECONDS = 5.0
START_SECONDS = 30.0
FINISH_SECONDS = 120.0
"""How long a service may hold up the start of the tracking and the end of a run."""

Mode = Literal["online", "offline"]
DEFAULT_URL = "https://api.wandb.ai"


class WeightsAndBiases:
    """One W&B run for one run folder; its id is kept in ``tracking/wandb.json``, so that a resumed run goes on in it."""

    name, is_service = "wandb", True

    def __init__(self, config: TrackerConfig) -> None:
        self.config = config

    def start(self, *, run_name: str, run_config: dict[str, Any], folder: Path) -> None:
        mode, why = choose_mode(self.config.mode)
        self.run_name = run_name
        identity = _identity(folder / "wandb.json", run_name=run_name)
        if mode == "online":
            try:
                _reach(_base_url())
                self.run = self._init(identity, run_name=run_name, run_config=run_config, folder=folder, mode=mode)
            except TrackerError as error:
                mode, why = "offline", f"{error} ({why})"
                _release()
        if mode == "offline":
            self.run = self._init(identity, run_name=run_name, run_config=run_config, folder=folder, mode=mode)
        if mode == "offline":
            log(
                "tracking",
                f"wandb: offline, because {why}; to send it later: wandb sync {self.run.dir.removesuffix('/files')}",
            )
        else:
            log("tracking", f"wandb: online, because {why}: {self.run.url}")

    def _init(
        self, identity: dict[str, str], *, run_name: str, run_config: dict[str, Any], folder: Path, mode: Mode
    ) -> Any:
        import wandb

        # Offline there is nothing to resume from; W&B would warn.
        resume: Literal["allow"] | None = "allow" if mode == "online" else None
        with _failures():
            run = wandb.init(
                project=self.config.project, entity=self.config.entity, group=self.config.group, tags=self.config.tags or None,
                name=run_name, id=identity["id"], resume=resume, mode=mode, dir=str(folder), config=run_config,
                settings=_settings(), reinit="create_new",
            )  # fmt: skip
            # Our own axis: after a resumption steps come again, and W&B drops what goes backwards on its own one.
            run.define_metric("step", hidden=True)
            run.define_metric("*", step_metric="step")
        return run

    def log(self, step: int, metrics: Figures) -> None:
        with _failures():
            self.run.log({"step": step, **metrics})

    def summary(self, metrics: Figures) -> None:
        with _failures():
            self.run.summary.update(dict(metrics))

    def artifact(self, path: Path, *, name: str, kind: str) -> None:
        if not self.config.artifacts:
            return
        import wandb

        with _failures():
            artifact = wandb.Artifact(_slug(f"{self.run_name}-{name}"), type=kind)
            # Immutable and without cache: W&B reads the file where it is instead of copying it into the home folder.
            if path.is_dir():
                artifact.add_dir(str(path), policy="immutable", skip_cache=True)
            else:
                artifact.add_file(str(path), policy="immutable", skip_cache=True)
            self.run.log_artifact(artifact)

    def finish(self) -> None:
        with _failures():
            self.run.finish()
            _release()


def choose_mode(wish: str) -> tuple[Mode, str]:
    """``online`` or ``offline``, and why. WANDB_MODE, W&B's own switch, goes before ``auto``.

    Without a key nothing goes online, even if asked: W&B would stop the run and ask for one.
    """
    asked = [(wish, "tracking.wandb.mode"), (os.environ.get("WANDB_MODE"), "WANDB_MODE")]
    mode, by = next(((mode, by) for mode, by in asked if mode in ("online", "offline")), ("auto", ""))
    if mode == "offline":
        return "offline", f"{by}=offline"
    host = urlsplit(_base_url()).hostname or ""
    key = "WANDB_API_KEY is set" if os.environ.get("WANDB_API_KEY") else ""
    key = key or (f"this user is logged in to {host}" if _netrc_knows(host) else "")
    if key:
        return "online", f"{by}=online" if mode == "online" else key
    missing = "there is no WANDB_API_KEY and nobody is logged in"
    return "offline", f"{by}=online, but {missing}" if mode == "online" else missing


def _base_url() -> str:
    return os.environ.get("WANDB_BASE_URL", DEFAULT_URL)


def _reach(url: str) -> None:
    """Asks the server for any answer at all: W&B's own start would try for half a minute first."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        raise TrackerError(f"{url} cannot be reached") from error


def _release() -> None:
    """Ends W&B's helper process: it holds the id of a run that could not start, and the last lines of one that ended."""
    import wandb

    wandb.teardown()


def _netrc_knows(host: str) -> bool:
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(file)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _identity(file: Path, *, run_name: str) -> dict[str, str]:
    """The W&B run's id: the run's name, and a random end, since a project may hold many runs of one name."""
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    identity = {"id": f"{_slug(run_name)[:48]}-{secrets.token_hex(4)}"}
    write_json(file, identity)
    return identity


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def _settings() -> Any:
    """No console, code, git remote, program, host or packages: what leaves the machine is what the run gives."""
    import wandb

    return wandb.Settings(
        console="off", silent=True, disable_code=True, disable_git=True, disable_job_creation=True, save_code=False, host="",
        x_disable_meta=True, x_disable_machine_info=True, x_disable_stats=True, x_save_requirements=False, init_timeout=START_SECONDS,
        finish_timeout=FINISH_SECONDS,
    )  # fmt: skip


@contextmanager
def _failures() -> Iterator[None]:
    """Turns whatever W&B raises when it cannot be reached, or its helper process is gone, into one kind of error."""
    import wandb
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError
    from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

    try:
        yield
    except (wandb.Error, OSError, HandleAbandonedError, MailboxClosedError, ServerResponseError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TrackerError(f"W&B does not take it ({lines[0]})") from error
