"""Messages, tables and bars: plain where a program reads them, coloured and alive where a person does."""

import io
import os
import pty
import subprocess
import sys

import pytest

from finetune.console import ProgressBar, log, table

SHOW = """
from finetune.console import ProgressBar, log, table
with ProgressBar("train", total=3, unit="steps") as bar:
    bar.move_to(1, note="loss 2.5")
    log("train", "a message in between")
    table("plan", ["stage", "GiB"], [["load", "1.0"]])
"""


def on_a_terminal(**environment: str) -> str:
    """What a person sees of SHOW, escape codes included."""
    ours, theirs = pty.openpty()
    settings = {**os.environ, "TERM": "xterm", "COLUMNS": "100", **environment}
    settings = {name: value for name, value in settings.items() if value}
    child = subprocess.Popen([sys.executable, "-c", SHOW], stdout=theirs, stderr=theirs, env=settings)
    os.close(theirs)
    seen = b""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # the terminal's other side is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    assert child.wait() == 0
    return seen.decode()


def test_a_file_gets_plain_wrapped_text(capsys: pytest.CaptureFixture[str]) -> None:
    log("plan", "word " * 30)
    table("plan", ["stage", "GiB"], [["load", "1.0"], ["step", "12.5"]])
    with ProgressBar("train", total=3) as bar:
        bar.move_to(2)
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "plan       " + " ".join(["word"] * 20),
        "           " + " ".join(["word"] * 10),
        "plan       stage   GiB",
        "           load    1.0",
        "           step   12.5",
    ]
    assert err == ""


def test_without_a_terminal_progress_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("finetune.console.PLAIN_SECONDS", 0.0)
    with ProgressBar("train", total=1200, unit="steps") as bar:
        bar.move_to(1000, note="loss 2.5")
    assert capsys.readouterr().err == "train      1,000 of 1,200 steps, loss 2.5\n"


def test_a_stream_of_ones_own_gets_the_message() -> None:
    stream = io.StringIO()
    log("data", "said", stream=stream)
    assert stream.getvalue() == "data       said\n"


def test_a_terminal_gets_colours_and_messages_do_not_tear_the_bar() -> None:
    seen = on_a_terminal(NO_COLOR="")
    assert "\x1b[36mtrain" in seen
    lines = [line for line in seen.splitlines() if "a message in between" in line]
    assert len(lines) == 1
    assert "steps" not in lines[0]


def test_no_color_turns_colours_off() -> None:
    seen = on_a_terminal(NO_COLOR="1")
    assert "a message in between" in seen
    assert "\x1b[36m" not in seen
    assert "\x1b[1m" not in seen


def test_bars_of_libraries_are_silent_and_those_of_downloads_stay() -> None:
    code = (
        "from finetune.console import quiet_libraries; quiet_libraries(); "
        "import transformers.utils.logging as logging; from datasets import is_progress_bar_enabled; "
        "from huggingface_hub.utils import are_progress_bars_disabled as off; "
        "print(logging.is_progress_bar_enabled(), is_progress_bar_enabled(), off('huggingface_hub.http_get'))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("DISABLE_PROGRESS_BARS")}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert answer.stdout.split() == ["False", "False", "False"]
