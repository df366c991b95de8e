"""The commands that a run prints at its end, run as they are printed; only the port is a free one."""

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.usage import run_commands
from tests.fixtures.served import server_process

ROOT = Path(__file__).parents[2]
EXPORTS = [("adapter", "export/adapter"), ("safetensors", "export/safetensors")]


def printed(run: Path) -> dict[str, list[str]]:
    """Returns the words of each command, by title."""
    return {use.title: shlex.split(use.command) for use in run_commands(run, EXPORTS)}


@pytest.mark.parametrize("title", ["chat", "compare"])
def test_chat(
    title: str, verified_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Wake me at 3 on Monday, please.\n"))
    assert main(printed(verified_run)[title][1:]) == 0
    assert capsys.readouterr().out.strip()


def test_serve_then_verify(verified_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = printed(verified_run)
    with server_process(commands["serve"]) as served:
        verify = [re.sub("^url=.*", f"url={served.url}", word) for word in commands["verify"]]
        assert verify != commands["verify"]
        assert main([*verify[1:], "--rows", "4"]) == 0
        assert "tiny is what was trained" in capsys.readouterr().out
        served.process.terminate()
        served.process.communicate(timeout=60)


def test_python(verified_run: Path) -> None:
    words = printed(verified_run)["Python"]
    code = f"{words[2]}; print(type(model).__name__, len(tokenizer) > 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, "PeftModelForCausalLM True" in done.stdout) == (0, True), done.stderr
