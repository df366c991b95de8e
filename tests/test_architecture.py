"""The law of the house, read from the code: who may import whom, and how large a room may grow."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "finetune"
FILES = sorted(ROOT.rglob("*.py"))
STAGES = ("plan", "data", "preflight", "train", "merge", "eval", "export", "report")
FURNITURE = {
    "trl": {"train", "bench"},
    "wandb": {"tracking"},
    "bitsandbytes": {"quantization", "inference", "merge", "bench"},
    "lm_eval": {"eval"},
    "peft": {"lora", "inference", "export", "merge"},
    "hydra": {"config", "cli", "provenance", "sweep"},
    "optuna": {"sweep"},
}
"""Which rooms may import a third-party framework."""


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(file: Path, *, with_types: bool = False) -> set[str]:
    """Modules that a file imports, those under ``if TYPE_CHECKING`` left out: a type is a product, not a stage."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and isinstance(test.test, ast.Name) and test.test.id == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only and not with_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize(
    "file", [file for file in FILES if room(file) in STAGES], ids=lambda file: str(file.relative_to(ROOT))
)
def test_no_stage_imports_another(file: Path) -> None:
    others = {name.split(".")[1] for name in imports(file) if name.startswith("finetune.")} & set(STAGES) - {room(file)}
    assert not others


@pytest.mark.parametrize("framework", FURNITURE)
def test_a_framework_is_furniture_of_its_rooms(framework: str) -> None:
    users = {room(file) for file in FILES if any(name.split(".")[0] == framework for name in imports(file))}
    assert users <= FURNITURE[framework]


def test_only_the_pipeline_knows_the_order() -> None:
    knowing = {
        room(file)
        for file in FILES
        if len({name.split(".")[1] for name in imports(file) if name.startswith("finetune.")} & set(STAGES)) > 4
    }
    assert knowing <= {"pipeline", "config"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_grows_beyond_300_lines(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("stage", STAGES)
def test_a_room_exports_five_names_at_most(stage: str) -> None:
    tree = ast.parse((ROOT / stage / "__init__.py").read_text(encoding="utf-8"))
    exported = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    )
    assert len(ast.literal_eval(exported)) <= 5
