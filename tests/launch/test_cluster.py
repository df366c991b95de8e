"""The files for clusters are those that the launch group gives, and each is one that its system reads."""

import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from finetune.launch.start import accelerate_config
from tests.fixtures.processes import ROOT
from tests.fixtures.scripts import script as open_script

CLUSTER = ROOT / "scripts" / "cluster"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return open_script("make_cluster_files")


def test_shipped_files_are_what_the_launch_group_gives(maker: ModuleType) -> None:
    for name, text in maker.files(maker.shipped()).items():
        assert (CLUSTER / name).read_text() == text, f"run scripts/make_cluster_files.py: {name} is old"


def test_slurm_script_is_bash_and_deals_the_nodes(tmp_path: Path) -> None:
    """Run with stand-ins for Slurm's programs: each task must start finetune with its own number and the first host."""
    (tmp_path / "scontrol").write_text("#!/bin/bash\nprintf 'first\\nsecond\\n'\n")
    (tmp_path / "srun").write_text('#!/bin/bash\nshift\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done\n')
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s|" "$@"; echo\n')
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "x"}
    said = subprocess.run(
        ["bash", CLUSTER / "slurm.sh", "+experiment=a b", "run.name=c"],
        env=environment,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.splitlines()
    assert [line.split("|")[:4] for line in said] == [["-m", "finetune", "+experiment=a b", "run.name=c"]] * 2
    assert ["launch.node=0|launch.host=first|" in said[0], "launch.node=1|launch.host=first|" in said[1]] == [
        True,
        True,
    ]


def test_kubernetes_job_fits_the_schema() -> None:
    validator = shutil.which("kubernetes-validate")
    if validator is None:
        pytest.skip("the program kubernetes-validate is not installed (pip install kubernetes-validate)")
    done = subprocess.run(
        [validator, "--strict", CLUSTER / "kubernetes.yaml"], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_sky_task_starts_every_node() -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    assert task["num_nodes"] == 2
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)
    assert "launch.node=$SKYPILOT_NODE_RANK" in task["run"]


def test_accelerate_reads_what_it_is_given(maker: ModuleType, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump(accelerate_config(maker.shipped())))
    read = load_config_from_file(str(file))
    assert (read.num_processes, read.num_machines, read.main_process_ip, read.mixed_precision) == (2, 2, "first", "no")
