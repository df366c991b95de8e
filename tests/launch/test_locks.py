"""Two runs on one folder or one cache: the second waits or is refused, and a killed one leaves nothing locked."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.cache import exclusive
from finetune.errors import ConfigError
from finetune.run import RunFolder, RunSettings
from tests.fixtures.processes import ROOT

HOLD_RUN = """
import pathlib, sys, time
from finetune.run import RunFolder
with RunFolder(pathlib.Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""
HOLD_CACHE = """
import pathlib, sys, time
from finetune.cache import exclusive
with exclusive(pathlib.Path(sys.argv[1]), "key", what="it"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(code: str, *arguments: object) -> "subprocess.Popen[str]":
    """A process that holds a lock, once it holds it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_run_on_one_folder_is_refused_and_a_killed_first_one_frees_it(tmp_path: Path) -> None:
    first = holder(HOLD_RUN, tmp_path)
    with pytest.raises(ConfigError, match="another process works in"), RunFolder(tmp_path).lock():
        pass
    settings = RunSettings(name=tmp_path.name, root=str(tmp_path.parent), seed=1, if_exists="overwrite")
    with pytest.raises(ConfigError, match="another process works in"):
        RunFolder.open(settings)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with RunFolder(tmp_path).lock():
        pass


def test_lock_of_a_folder_that_was_deleted_meanwhile_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    real = fcntl.flock

    def flock(handle: object, how: int) -> None:
        (
            tmp_path / ".lock"
        ).unlink()  # what run.if_exists=overwrite of another process does between opening and locking
        (tmp_path / ".lock").touch()
        real(handle, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match="another process works in"), RunFolder(tmp_path).lock():
        pass


def test_second_maker_of_a_cached_thing_waits_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = holder(HOLD_CACHE, tmp_path, 1.5)
    since = time.monotonic()
    with exclusive(tmp_path, "key", what="it"):
        assert time.monotonic() - since > 0.5
    assert "another run is making it" in capsys.readouterr().out
    assert first.wait() == 0


def test_killed_maker_of_a_cached_thing_frees_it(tmp_path: Path) -> None:
    first = holder(HOLD_CACHE, tmp_path, 60)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with exclusive(tmp_path, "key", what="it"), exclusive(tmp_path, "other", what="that"):
        pass


def test_cache_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with exclusive(tmp_path / "file" / "cache", "key", what="it"):
        pass
