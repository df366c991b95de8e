"""One whole tiny run in a process of its own, with secrets in its environment, shared by the tests of this folder."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_pipeline import overrides

ROOT = Path(__file__).parents[2]
CANARIES = {
    "HF_TOKEN": "hf_CanaryQx7Zk2Vb9Lm4Np6Rt8Yw1Ua3Sd5",
    "HUGGING_FACE_HUB_TOKEN": "hf_CanarySecondW4Er6Ty8Ui0Op2As4Df6",
    "WANDB_API_KEY": "ca9a2ee1d0c0ffee5ca9a2ee1d0c0ffee5ca9a2e",
    "OPENAI_API_KEY": "sk-CanaryGh5Jk7Lz9Xc1Vb3Nm5Qw7Er9",
    "AWS_SECRET_ACCESS_KEY": "CanaryAws/8Ty6Ui4Op2As0Df8Gh6Jk4Lz2Xc0",
}


@dataclass(frozen=True)
class TinyRun:
    """A finished run: ``home`` holds its folder and every cache and log that the process could write to."""

    home: Path
    folder: Path
    said: str
    code: int


def start(home: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """``python -m finetune`` with the canaries, and with every place to write below ``home``."""
    places = {
        "HOME": home, "XDG_CACHE_HOME": home / "cache", "XDG_CONFIG_HOME": home / "config", "XDG_DATA_HOME": home / "share",
        "FINETUNE_CACHE": home / "finetune", "HF_HOME": home / "hf", "TMPDIR": home / "tmp",
    }  # fmt: skip
    for place in places.values():
        place.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        **{name: str(place) for name, place in places.items()},
        **CANARIES,
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "finetune", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=home)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> TinyRun:
    home = tmp_path_factory.mktemp("accountable")
    done = start(home, [*overrides(home, tiny_base), "tracking=[wandb]"])
    return TinyRun(home=home, folder=home / "outputs" / "tiny", said=done.stdout + done.stderr, code=done.returncode)
