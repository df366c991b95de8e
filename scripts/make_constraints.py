"""Writes ``constraints.txt``: the versions here of all packages that this project and its extra ``dev`` bring.

``pip install -e '.[gguf]' -c constraints.txt`` installs what the tests ran with. Builds for CUDA and for CPUs have the
same version, so the file serves both.
"""

import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FILE = ROOT / "constraints.txt"


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = installed(project, extras=("dev",))
    command = "# Versions that the tests ran with: pip install -e . -c constraints.txt (scripts/make_constraints.py)\n"
    FILE.write_text(command + "".join(f"{name}=={pins[name]}\n" for name in sorted(pins)), encoding="utf-8")
    print(f"{len(pins)} packages in {FILE}", file=sys.stderr)


def installed(project: dict[str, Any], *, extras: Sequence[str]) -> dict[str, str]:
    """Returns name and version of each requirement, and of each requirement of those, that is installed."""
    own = canonicalize_name(project["name"])
    waiting = [(Requirement(text), "") for text in project["dependencies"]]
    seen, pins = set[tuple[str, str]](), dict[str, str]()
    waiting += [(Requirement(text), "") for extra in extras for text in project["optional-dependencies"][extra]]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if (name, wanted) in seen:
                continue
            seen.add((name, wanted))
            if name == own:
                waiting += [(Requirement(text), "") for text in project["optional-dependencies"].get(wanted, [])]
                continue
            try:
                found = distribution(name)
            except PackageNotFoundError:
                continue  # an optional requirement of another platform or Python
            pins[name] = Version(found.version).public
            waiting += [(Requirement(text), wanted) for text in found.requires or []]
    return pins


if __name__ == "__main__":
    main()
