"""A full disk, missing rights and the like are one message with the path and the remedy, whatever library meets it."""

import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from finetune.cli import main
from finetune.errors import EXIT_FAILURE
from finetune.files import atomic_write_text
from finetune.inference.fresh_process import run_in_fresh_process
from finetune.system_errors import REMEDIES, as_system_error, explain
from tests.fixtures.little_disk import on_little_disk
from tests.fixtures.overrides import overrides
from tests.fixtures.tiny_run import ROOT

FULL = "/dev/full"
"""Every write to it finds no space. Source: full(4) of Linux."""


def with_numpy() -> None:
    with open(FULL, "wb") as file:
        np.zeros(2**20).tofile(file)


def with_text() -> None:
    Path(FULL).write_text("a" * 2**20)


def with_sqlite() -> None:
    raise sqlite3.OperationalError("database or disk is full")


@pytest.mark.parametrize(
    "write",
    [with_numpy, with_text, with_sqlite, lambda: torch.save(torch.zeros(2**18), FULL)],
    ids=["numpy", "text", "SQLite", "torch"],
)
def test_a_full_disk_is_found_in_what_each_library_raises(write: Callable[[], None], tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each library has a class of its own
        write()
    found = as_system_error(caught.value, tmp_path)
    assert found is not None
    message = explain(found)
    assert message is not None
    assert message.startswith((f"{tmp_path}: No space left on device; free some space there", f"{FULL}: No space"))
    assert message.endswith("TMPDIR; a run continues with run.if_exists=resume")


def test_an_error_of_rust_names_its_number(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="os error") as caught:
        save_file({"a": torch.zeros(1)}, str(tmp_path / "nothing" / "a.safetensors"))
    assert as_system_error(caught.value, tmp_path) is None, "a text does not say which path is missing"
    denied = as_system_error(RuntimeError("Permission denied (os error 13)"), tmp_path)
    assert denied is not None
    assert (denied.errno, denied.filename) == (errno.EACCES, str(tmp_path))


def test_an_error_of_the_system_in_a_fresh_process_is_one_here(tmp_path: Path) -> None:
    (tmp_path / "full.py").write_text(f"open('{FULL}', 'w').write('a' * 2**20)\n")
    with pytest.raises(OSError, match="No space left on device"):
        run_in_fresh_process("full", {}, work=tmp_path, environment={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    for error in (ValueError("no"), OSError("no route"), ConnectionResetError(errno.ECONNRESET, "reset")):
        assert as_system_error(error, tmp_path) is None
    assert explain(ConnectionResetError(errno.ECONNRESET, "reset")) is None


@pytest.mark.parametrize("number", REMEDIES)
def test_the_command_line_ends_with_1_the_path_and_the_remedy(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number), "/some/file")

    monkeypatch.setattr("finetune.cli.dispatch.dispatch", fail)
    assert main(["plan"]) == EXIT_FAILURE
    expected = (
        f"finetune: /some/file: {os.strerror(number)}; {REMEDIES[number]}; a run continues with run.if_exists=resume\n"
    )
    assert capsys.readouterr().err == expected


def test_data_on_a_full_disk_are_one_message(tiny_base: Path, tmp_path: Path) -> None:
    code, output = on_little_disk(20_000, [*overrides(tmp_path, tiny_base), "tracking=[]", "run.until=data"])
    assert (code, "Traceback" in output) == (EXIT_FAILURE, False), output
    assert "; a run continues with run.if_exists=resume" in output


def test_a_file_that_cannot_be_written_is_named_and_its_part_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        atomic_write_text(tmp_path / "report.html", "text")
    assert caught.value.filename == str(tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
