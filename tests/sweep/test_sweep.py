"""A sweep: checks before it starts, the job folders, and one that is stopped and continued."""

import fcntl
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.config import load
from finetune.sweep.jobs import LOCK, Job, job_name, jobs_in
from finetune.sweep.median import should_prune
from finetune.sweep.work import outcome
from tests.fixtures.overrides import overrides

ROOT = Path(__file__).parent.parent.parent


def refused(arguments: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The problems that a sweep names; it must leave nothing should_prune."""
    assert main(["--multirun", "+experiment=quickstart", f"run.root={folder / 'outputs'}", *arguments]) == 2
    assert not (folder / "outputs").exists()
    return [line.removeprefix("  - ") for line in capsys.readouterr().err.splitlines()[1:]]


def test_problems_of_all_jobs_are_named_before_any_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["lora.rank=0,8", "optim.learning_rate=-1,1e-3", "lora.rnak=3"], tmp_path, capsys) == [
        "lora.rnak: there is no such setting; did you mean lora.rank?"
    ]
    assert refused(["lora.rank=0,8", "train.micro_batch=0,1", "optim.learning_rate=-1"], tmp_path, capsys) == [
        "lora.rank must be at least 1; got 0 "
        "(in the jobs lora.rank=0 train.micro_batch=0, lora.rank=0 train.micro_batch=1)",
        "train.micro_batch must be a whole number of at least 1, or auto; got 0 "
        "(in the jobs lora.rank=0 train.micro_batch=0, lora.rank=8 train.micro_batch=0)",
        "optim.learning_rate must be positive, or nothing trains; got -1.0",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora.rank=8"], "--multirun needs a setting with several values, e.g. lora.rank=8,16,32"),
        (["run.name=a,b"], "run.name belongs to the whole sweep and cannot be swept; give it one value"),
        (
            ["lora.rank=8,16", "--config-dir=conf"],
            "--config-dir does not go with --multirun: the jobs are started without it",
        ),
        (["lora.rank=8,16", "sweep.name=a/b"], "sweep.name must be a plain folder name; got 'a/b'"),
    ],
)
def test_what_cannot_be_a_sweep_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(arguments, tmp_path, capsys) == [message]


def test_another_command_under_the_name_of_a_sweep_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "sweep.json").write_text('{"fixed": ["+experiment=quickstart", "train.steps=2"]}')
    settings = ["+experiment=quickstart", "lora.rank=8,16", "sweep.name=ranks", f"run.root={tmp_path}"]
    assert main(["--multirun", *settings, "train.steps=4"]) == 2
    assert "was made with +experiment=quickstart train.steps=2 and this command says" in capsys.readouterr().err


def test_a_jobs_name_is_its_values_and_needs_no_quotes() -> None:
    assert job_name({"lora.rank": "8", "optim.learning_rate": "1e-3"}) == "lora.rank-8_optim.learning_rate-1e-3"
    comma, space = job_name({"lora.targets": "[q_proj,v_proj]"}), job_name({"lora.targets": "[q_proj v_proj]"})
    assert comma != space
    for name in (comma, space, job_name({"+data.path": "/a b/" + 40 * "c"})):
        assert load(["+experiment=quickstart", f"run.name={name}"]).run.name == name


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "fine", ("done", "")),
        (
            2,
            "run x\nfinetune: 2 problems in the configuration:\n  - a\n  - b\n",
            ("failed", "2 problems in the configuration: - a - b"),
        ),
        (1, "Traceback\n  File ...\nRuntimeError: no\n", ("failed", "RuntimeError: no")),
        (75, "finetune: train: stopped\n", ("interrupted", "train: stopped")),
        (-9, "", ("failed", "killed by SIGKILL, as the kernel does when memory runs out")),
    ],
)
def test_why_a_job_ended_is_one_line(code: int, output: str, expected: tuple[str, str]) -> None:
    assert outcome(code, output) == expected


def test_a_job_worse_than_the_median_is_stopped_and_no_other() -> None:
    others = [{10: 1.0, 20: 0.5}, {10: 2.0, 20: 1.5}, {10: 3.0, 20: 2.5}]
    assert should_prune({10: 2.5}, others, after_jobs=3, after_steps=0) == (
        "its best held-out loss up to step 10, 2.5000, is worse than the median of the finished jobs"
    )
    assert not should_prune({10: 1.9}, others, after_jobs=3, after_steps=0)
    assert not should_prune({10: 2.5}, others, after_jobs=4, after_steps=0)
    assert not should_prune({10: 2.5}, others, after_jobs=3, after_steps=15)


def test_a_running_job_that_no_process_holds_was_interrupted(tmp_path: Path) -> None:
    job = Job.of(tmp_path, {"lora.rank": "8"})
    job.folder.mkdir()
    job.state = "running"
    job.write()
    with open(job.folder / LOCK, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert [job.state for job in jobs_in(tmp_path)] == ["running"]
    assert [job.state for job in jobs_in(tmp_path)] == ["interrupted"]


def test_trackers_group_the_jobs_of_a_sweep() -> None:
    assert load(["+experiment=quickstart", "sweep.name=ranks"]).tracking["wandb"].group == "ranks"
    assert load(["+experiment=quickstart"]).tracking["wandb"].group is None


@pytest.mark.slow
def test_a_stopped_sweep_continues_and_a_failed_job_stays_in_the_table(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first job is stopped in its training, the second asks for layers that the model does not have."""
    arguments = [
        "--multirun",
        *overrides(tmp_path, tiny_base),
        "lora.targets=[q_proj],[query]",
        "sweep.name=targets",
        "run.until=train",
        "preflight=off",
        "train.steps=30",
        "train.evaluations=1",
        "train.checkpoints=3",
    ]
    folder = tmp_path / "outputs" / "targets"
    sweep = subprocess.Popen(
        [sys.executable, "-m", "finetune", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    while sweep.poll() is None and not any(
        job.losses() or list(job.folder.glob("train/metrics.jsonl")) for job in jobs_in(folder)
    ):
        time.sleep(0.1)
    sweep.send_signal(signal.SIGTERM)
    assert "sweep: stopped; the same command continues" in sweep.communicate(timeout=60)[1]
    assert sweep.returncode == 75
    assert [job.state for job in jobs_in(folder)] == ["interrupted"]

    assert main(arguments) == 1
    done, failed = jobs_in(folder)
    assert (done.state, failed.state) == ("done", "failed")
    assert failed.reason.startswith("lora.targets: query match no linear layer")
    assert json.loads((done.folder / "train" / "manifest.json").read_text())["product"]["resumed_from"] > 0
    capsys.readouterr()
    assert main(["report", "--sweep", "targets", f"run.root={tmp_path / 'outputs'}"]) == 0
    assert "2 jobs: 1 done, 1 failed" in capsys.readouterr().out
    jobs = json.loads((folder / "report.json").read_text())["jobs"]
    assert [job["changed"] for job in jobs] == [{"lora.targets": "[q_proj]"}, {"lora.targets": "[query]"}]
    assert jobs[0]["held_out"]["loss"] > 0
    assert "query match no linear layer" in (folder / "report.html").read_text()
