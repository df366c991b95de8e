"""Converts the training files in folders of other tools' examples: ``python -m benchmarks.convert FOLDER...``.

Each file that `finetune convert` takes for a training file is translated. The experiment is composed with all checks,
and planned where this project knows the dimensions of the model, so that nothing is downloaded. Prints a line for each
tool and the settings that are missing most often, and ends with one line of JSON.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.cli import main as finetune
from finetune.config import load
from finetune.convert import Translation, experiment_text, read_file, translate
from finetune.errors import ConfigError, FinetuneError

KINDS = (".yml", ".yaml", ".sh")
SHOWN_MISSING = 8


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What became of one file.

    Attributes:
        translation: Of its settings.
        problem: Why the experiment does not compose; empty where it does.
        plan: Exit code of the plan; None where the model's dimensions are not known here.
    """

    translation: Translation
    problem: str
    plan: int | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    files = sorted(file.resolve() for folder in parser.parse_args().folders for file in folder.rglob("*"))
    with tempfile.TemporaryDirectory() as desk:
        os.chdir(desk)
        Path("conf/experiment").mkdir(parents=True)
        converted = [one for file in files if file.suffix in KINDS for one in convert(file)]
    tools = sorted({one.translation.file.tool for one in converted})
    for tool in tools:
        print(line(tool, [one for one in converted if one.translation.file.tool == tool]))
    print(line("all", converted))
    for one in converted:
        if one.problem:
            print(f"does not compose: {one.translation.file.path}: {one.problem}")
    missing = Counter(name for one in converted for name, _, _ in one.translation.missing)
    print(f"missing most often: {', '.join(f'{name} ({times})' for name, times in missing.most_common(SHOWN_MISSING))}")
    print(json.dumps({"files": len(converted), **totals(converted)}))


def convert(file: Path) -> Iterator[Converted]:
    """Yields the file's conversion; nothing where it is no training file."""
    try:
        translation = translate(read_file(file))
    except ConfigError:
        return
    Path("conf/experiment/converted.yaml").write_text(experiment_text(translation, name="converted"), encoding="utf-8")
    try:
        config = load(["+experiment=converted"])
    except FinetuneError as error:
        yield Converted(translation=translation, problem=str(error), plan=None)
        return
    plan = None
    if config.model.architecture is not None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            plan = finetune(["plan", "+experiment=converted", "hardware=a100_80gb", "data.path=null", "data.hub=null"])
    yield Converted(translation=translation, problem="", plan=plan)


def totals(converted: list[Converted]) -> dict[str, int]:
    """Returns the sums over files."""
    return {
        "settings": sum(len(one.translation.file.values) for one in converted),
        "translated": sum(len(one.translation.translated) for one in converted),
        "unneeded": sum(len(one.translation.unneeded) for one in converted),
        "missing": sum(len(one.translation.missing) for one in converted),
        "composed": sum(not one.problem for one in converted),
        "planned": sum(one.plan == 0 for one in converted),
        "not_planned": sum(one.plan not in (None, 0) for one in converted),
    }


def line(name: str, converted: list[Converted]) -> str:
    """Returns one line for people."""
    counts = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in totals(converted).items())
    return f"{name:<14}{len(converted)} files: {counts}"


if __name__ == "__main__":
    main()
