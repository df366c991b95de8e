"""The notebook of the manual: it is stored without output, its commands exist, and it runs from top to bottom."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from finetune.cli.command import parse
from finetune.cli.dispatch import find_command

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "start" / "finetune.ipynb"
FEW = (
    "train.steps=2 train.tokens_per_step=200 train.evaluation_rows=4 eval.rows=4 eval.loss_rows=8 eval.max_new_tokens=8"
)
FEW_MORE = "eval.bootstrap_samples=50 merge.measure_tokens=60 merge.max_loss_increase=5 preflight=quick"


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(FILE, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: Any) -> str:
    return "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)


def test_notebook_is_valid_and_stored_without_output(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert not [cell for cell in code_cells(notebook) if cell.outputs or cell.execution_count]
    assert [cell.metadata.get("tags") for cell in code_cells(notebook)].count(["parameters"]) == 1


def test_commands_of_the_notebook_exist(notebook: Any) -> None:
    lines = [line for cell in code_cells(notebook) for line in cell.source.splitlines() if line.startswith("!")]
    commands = [shlex.split(line.rpartition("finetune ")[2]) for line in lines if "finetune " in line]
    assert [words[0] for words in commands] == ["env", "init", "plan", "+experiment=mine", "chat"]
    for words in commands:
        command, rest = find_command([word for word in words if word != "{SETTINGS}"])
        assert parse(command, rest).command is command


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(
    notebook: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    at = next(index for index, cell in enumerate(notebook.cells) if cell.metadata.get("tags") == ["parameters"])
    given = f"MODEL, SETTINGS = {str(tiny_base)!r}, {f'{FEW} {FEW_MORE}'!r}"
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(given))
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    content = json.loads((tmp_path / "outputs" / "mine" / "report.json").read_text())
    assert (content["status"], content["train"]["steps"]) == ("complete", 2), printed(notebook)
    assert "finetune: " not in printed(notebook)  # how an error begins
    assert "srcdoc=" in str(notebook.cells)
