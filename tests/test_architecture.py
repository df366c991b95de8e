"""The rules that hold for the whole code: who imports whom, how large things grow, and which words are not used."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "finetune"
FILES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = ("plan", "data", "preflight", "train", "merge", "eval", "export", "report")
FRAMEWORKS = {
    "trl": {"train", "bench"},
    "wandb": {"tracking"},
    "bitsandbytes": {"quantization", "inference", "merge", "bench"},
    "lm_eval": {"eval"},
    "peft": {"lora", "inference", "export", "merge"},
    "hydra": {"config", "cli", "provenance", "sweep"},
    "optuna": {"sweep"},
    "rich": {"console", "cli", "serve"},
    "jinja2": {"html", "data", "eval", "export", "serve", "verify"},
    "fastapi": {"serve"},
    "uvicorn": {"serve"},
}
"""The packages that may import a third-party framework."""

LONGEST_FILE, MOST_PARAMETERS, MOST_NAMES, MOST_UNFORMATTED = 300, 8, 5, 39

BANNED = {
    r"told(?! apart)": "is given, gets",
    r"said": "is printed, is logged",
    r"learnt": "trained on",
    r"beside": "next to, compared with",
    r"(?:goes|to go) on(?! (?:the|an?|each|every|its|one)\b)": "continues",
    r"on the way": "during training, meanwhile",
    r"golden chats?": "reference prompts",
    r"leaves? the house": "is exported",
    r"held base": "quantized base",
    r"rows at once": "batch size",
    r"no numbers?": "non-finite",
    r"numbers that": "the dtype that, values that",
    r"mend(?:s|ed|ing)?": "fix",
    r"heed(?:s|ed|ing)?": "apply, follow",
    r"quick steps?": "fused kernels",
    r"rooms?(?! (?:for|left)\b)": "package",
    r"rehears\w*": "preflight",
    r"(?:\d ?%|of their length|far|far they are|far both are) apart": "differ by",
    r"(?<!there )(?:is|are) no(?! (?:longer|more|less|fewer|different|other|\w+er than)\b)": "is not a",
}
"""Patterns of STYLE.md's "Plain words", each with what to write instead; matched as whole words in any case."""

VERB = re.compile("[A-Z][a-z-]*s")
NOUNS = {
    "As", "Axes", "Bytes", "Columns", "Documents", "Elements", "Figures", "Gradients", "Inputs", "Jobs", "Keys",
    "Layers", "Levels", "Logits", "Loss", "Messages", "Methods", "Nats", "Numbers", "Operations", "Overlays",
    "Overrides", "Parameters", "Parts", "Positions", "Powers", "Problems", "Rows", "Seconds", "Settings",
    "States", "Steps", "This", "Tokens", "Tools", "Weights",
}  # fmt: skip
"""First words that end like a verb in the third person and are none."""


def package(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


PACKAGES = sorted({package(file) for file in FILES})


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(file: Path, *, with_types: bool = False) -> set[str]:
    """Returns the modules that a file imports; those under ``if TYPE_CHECKING`` are types and not stages."""
    tree = parsed(file)
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and isinstance(test.test, ast.Name) and test.test.id == "TYPE_CHECKING"
        for node in ast.walk(test)
    }
    modules: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only and not with_types:
            continue
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return modules


def imported_packages(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(file) if name.startswith("finetune.")}


@pytest.mark.parametrize("file", [file for file in FILES if package(file) in STAGES], ids=name_of)
def test_no_stage_imports_another(file: Path) -> None:
    assert not imported_packages(file) & set(STAGES) - {package(file)}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_is_imported_by_its_packages_only(framework: str) -> None:
    users = {package(file) for file in FILES if any(name.split(".")[0] == framework for name in imports(file))}
    assert users <= FRAMEWORKS[framework]


def test_only_the_pipeline_knows_the_order() -> None:
    assert {package(file) for file in FILES if len(imported_packages(file) & set(STAGES)) > 4} <= {"pipeline", "config"}


def test_the_pipeline_unpacks_no_dict() -> None:
    unpacked = [
        node.lineno
        for node in ast.walk(parsed(SOURCE / "pipeline.py"))
        if (isinstance(node, ast.Call) and any(keyword.arg is None for keyword in node.keywords))
        or (isinstance(node, ast.Dict) and None in node.keys)
    ]
    assert not unpacked, f"lines {unpacked}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_file_grows_beyond_300_lines(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_no_line_is_longer_than_the_formatter_allows() -> None:
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--select",
        "E501",
        "--output-format",
        "concise",
        "--no-cache",
        ".",
    ]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_code_that_the_formatter_skips_is_rare() -> None:
    assert sum(file.read_text(encoding="utf-8").count("# fmt: skip") for file in FILES) <= MOST_UNFORMATTED


@pytest.mark.parametrize("name", PACKAGES)
def test_no_function_has_more_than_eight_parameters(name: str) -> None:
    large = {}
    for file in (file for file in FILES if package(file) == name):
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = sum(parameter.arg not in {"self", "cls"} for parameter in parameters)
                if count > MOST_PARAMETERS:
                    large[f"{name_of(file)}:{node.lineno} {node.name}"] = count
    assert not large


def exported(file: Path) -> list[str]:
    """Returns ``__all__`` of an ``__init__``, or every public name that it binds where there is none."""
    names: list[str] = []
    for node in parsed(file).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
        if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
            names += [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
    return [name for name in names if not name.startswith("_")]


@pytest.mark.parametrize("file", [file for file in FILES if file.name == "__init__.py"], ids=name_of)
def test_a_package_exports_five_names_at_most(file: Path) -> None:
    assert len(exported(file)) <= MOST_NAMES


@pytest.mark.parametrize("file", sorted(SOURCE.glob("*/__init__.py")), ids=name_of)
def test_a_package_begins_with_a_usage_example(file: Path) -> None:
    """One line of its docstring is a call, or the assignment of one."""
    assert re.search(r"^ *(?:[\w., ]+ = )?[\w.]+\(", ast.get_docstring(parsed(file)) or "", re.M)


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yields public functions, and public methods of public classes. A property is a noun, so it is left out."""
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        for member in members:
            if not isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) or member.name.startswith("_"):
                continue
            if not any("property" in ast.unparse(decorator) for decorator in member.decorator_list):
                yield member


@pytest.mark.parametrize("name", PACKAGES)
def test_a_docstring_starts_with_a_verb_in_the_third_person(name: str) -> None:
    others = []
    for file in (file for file in FILES if package(file) == name):
        for function in public_functions(parsed(file)):
            first = (ast.get_docstring(function) or "Is").split()[0].rstrip(",;:.")
            if not VERB.fullmatch(first) or first in NOUNS:
                others.append(f"{name_of(file)}:{function.lineno} {first}")
    assert not others, "\n".join(others)


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """Yields line and text of every comment and of every string of several words."""
    source = file.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            for number, line in enumerate(node.value.splitlines()):
                yield node.lineno + number, line


def banned_words(lines: Iterator[tuple[int, str]]) -> list[str]:
    """Returns the matches of the patterns; names in backticks are code and not read."""
    matches = []
    for number, line in lines:
        for pattern, instead in BANNED.items():
            match = re.search(rf"\b(?:{pattern})(?!\w)", re.sub(r"`+[\w./=-]+`+", "", line), re.IGNORECASE)
            if match:
                matches.append(f"{number}: {match.group(0)!r} (better: {instead})")
    return matches


@pytest.mark.parametrize("name", PACKAGES)
def test_messages_and_docstrings_use_plain_words(name: str) -> None:
    matches = [
        f"{name_of(file)}:{match}" for file in FILES if package(file) == name for match in banned_words(texts(file))
    ]
    assert not matches, "\n".join(matches)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_use_plain_words(page: Path) -> None:
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    assert not banned_words(iter(lines))


@pytest.mark.parametrize("file", TESTS, ids=name_of)
def test_no_test_module_imports_from_another(file: Path) -> None:
    assert not [name for name in imports(file, with_types=True) if name.split(".")[-1].startswith("test_")]
