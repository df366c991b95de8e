import os
import subprocess
import sys
import time

import pytest

from finetune.hardware.busy import CpuUsage, yield_to_busy_cpu


def test_other_programs_are_seen_and_this_one_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    idle = CpuUsage(others=100.0, all=1000.0)
    now = CpuUsage.now()
    monkeypatch.setattr(CpuUsage, "now", classmethod(lambda cls: CpuUsage(others=102.0, all=1010.0)))
    yield_to_busy_cpu(idle)
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setattr(CpuUsage, "now", classmethod(lambda cls: CpuUsage(others=105.0, all=1010.0)))
    yield_to_busy_cpu(idle)
    assert os.environ["GOMP_SPINCOUNT"] == "20000"
    assert "other programs use 50 %" in capsys.readouterr().out
    assert now.others > 0


def test_own_work_is_not_counted_as_anothers() -> None:
    code = (
        "import time\n"
        "from finetune.hardware.busy import CpuUsage\n"
        "before, end = CpuUsage.now(), time.process_time() + 0.5\n"
        "while time.process_time() < end: pass\n"
        "now = CpuUsage.now()\n"
        "print(now.all - before.all - (now.others - before.others))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.4


def test_a_busy_neighbour_is_counted() -> None:
    before = CpuUsage.now()
    subprocess.run(
        [sys.executable, "-c", "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"],
        check=True,
    )
    time.sleep(0.05)
    assert CpuUsage.now().others - before.others > 0.4
