import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from finetune.report.sweep import report_sweep
from finetune.report.sweep_picture import parallel_picture
from finetune.sweep import Job


def write_job(
    folder: Path,
    *,
    number: int,
    rank: int,
    optimizer: str,
    state: str = "done",
    loss: float | None = None,
    reason: str = "",
) -> Job:
    job = Job.of(folder, {"lora.rank": str(rank), "optim": optimizer}, number=number)
    (job.folder / "train").mkdir(parents=True)
    if loss is not None:
        (job.folder / "train" / "metrics.jsonl").write_text(
            json.dumps({"step": 4, "eval/loss": loss}) + '\n{"step": 8, "ev'
        )
    job.state, job.reason, job.seconds = state, reason, 60.0 + number
    job.write()
    return job


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    first = write_job(tmp_path, number=0, rank=8, optimizer="adamw", loss=1.2)
    (first.folder / "eval").mkdir()
    figures = {"loss": 1.1, "loss_low": 1.0, "loss_high": 1.25}
    manifest = {"stage": "eval", "peak_rss_bytes": 2**30, "product": {"artifacts": {"adapter": figures}}}
    (first.folder / "eval" / "manifest.json").write_text(json.dumps(manifest))
    write_job(tmp_path, number=1, rank=64, optimizer="adamw", loss=1.4)
    write_job(tmp_path, number=2, rank=512, optimizer="lion", loss=3.0, state="pruned", reason="worse than the median")
    write_job(tmp_path, number=3, rank=9, optimizer="lion", state="failed", reason="no <memory> left")
    return tmp_path


def test_every_job_is_in_the_table_with_its_state_and_reason(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not report_sweep(sweep)
    out = capsys.readouterr().out
    assert "4 jobs: 2 done, 1 pruned, 1 failed; lowest held-out loss: lora.rank-8_optim-adamw, 1.1000" in out
    assert "no <memory> left" in out
    content = json.loads((sweep / "report.json").read_text())
    assert [entry["state"] for entry in content["jobs"]] == ["done", "done", "pruned", "failed"]
    assert content["jobs"][0]["held_out"] == {"loss": 1.1, "low": 1.0, "high": 1.25}
    assert content["jobs"][0]["peak_bytes"] == 2**30
    assert content["jobs"][1]["held_out"] == {"loss": 1.4, "low": None, "high": None}
    page = (sweep / "report.html").read_text()
    assert "no &lt;memory&gt; left" in page
    assert page.count("<path") == 3


def test_parallel_axes_are_logarithmic_where_values_lie_decades_apart(sweep: Path) -> None:
    jobs = [
        {"run": str(rank), "changed": {"lora.rank": str(rank)}, "state": "done", "held_out": {"loss": 1.0 + rank}}
        for rank in (1, 10, 100)
    ]
    drawn = ElementTree.fromstring(parallel_picture(["lora.rank"], jobs))
    heights = sorted({float(dot.attrib["cy"]) for dot in drawn.iter("circle") if float(dot.attrib["cx"]) < 200})
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert parallel_picture(["lora.rank"], []) == ""
