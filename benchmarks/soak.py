"""Kills, fills disks, damages files and starts twice, many times, on a tiny model: ``python -m benchmarks.soak``.

Every trial is a run of the real command line in processes of its own, and survives if the run ends with the adapter,
merged model and exports of an undisturbed run, to the byte. Where it has to refuse, it does so in one message, without
a traceback, and nothing is lost::

    python -m benchmarks.soak kills=20 damages=20 disks=8 twins=4 seed=1

Arguments of `Soak`, each ``name=number``. Each trial prints a line; the last line is JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.walk import Walk, environment, overrides
from benchmarks.walk_base import make_base
from finetune.cache import file_sha256
from finetune.config import load
from finetune.console import log, print_error
from finetune.errors import EXIT_USAGE, ConfigError

EXPERIMENT = "quickstart"
PRODUCTS = ("train/adapter/adapter_model.safetensors", "merge/model/*.safetensors", "export/*/*.safetensors")
DAMAGED = ("data/train/*.arrow", "train/adapter/*.safetensors", "merge/model/*.safetensors")
"""Products that a later stage reads, by the stages' order."""

NEXT = {"data": "train", "train": "merge", "merge": "export"}
"""The stage that is run again after a product of the stage before was damaged."""

SECONDS = 900
"""A trial that takes longer hangs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Soak:
    """Number of trials of each kind.

    Attributes:
        kills: Runs that are killed twice at random moments and then finished.
        damages: Finished runs of which a byte of a product is changed before a stage is run again.
        disks: Runs whose files may only have a random size until they are run again.
        twins: Pairs of processes that start the same run at once.
        seed: Of all random choices.
    """

    kills: int = 20
    damages: int = 12
    disks: int = 8
    twins: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended.

    Attributes:
        code: Exit code, negative for a signal.
        output: Both streams.
    """

    code: int
    output: str

    def has_one_message(self) -> bool:
        """Returns whether it refused as a user should see it: one message, and no traceback."""
        return self.code > 0 and "finetune: " in self.output and "Traceback" not in self.output


class Ground:
    """A tiny base, and the undisturbed run that all others are compared with.

    Args:
        folder: To work in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "outputs"
        recipe = load([f"+experiment={EXPERIMENT}"])
        make_base(recipe, folder / "base", tiny=True)
        settings = Walk(experiment=EXPERIMENT, size="tiny", overrides=("hardware.threads=1", "train.checkpoints=3"))
        self.words = [word for word in overrides(recipe, settings, folder) if not word.startswith("run.name=")]
        started = time.monotonic()
        ended = self.run("undisturbed")
        if ended.code:
            raise ConfigError(f"benchmarks.soak: the undisturbed run failed: {ended.output[-800:]}")
        self.seconds, self.wanted = time.monotonic() - started, hashes(self.root / "undisturbed")
        log("soak", f"the undisturbed run took {self.seconds:.0f} s and has {len(self.wanted)} products")

    def run(self, name: str, *, kill_after: float | None = None, largest_file: int | None = None) -> Ended:
        """Runs or resumes the line to its end, or to a SIGKILL of its whole process group after so many seconds."""
        process = self.start(name, largest_file=largest_file)
        try:
            output, _ = process.communicate(timeout=kill_after or SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        return Ended(code=process.returncode, output=output)

    def start(self, name: str, *, largest_file: int | None = None) -> subprocess.Popen[str]:
        """Starts a run in a process group of its own; no file may become larger than ``largest_file`` bytes."""
        return self.command([*self.words, f"run.name={name}", "run.if_exists=resume"], largest_file=largest_file)

    def command(self, words: Sequence[str], *, largest_file: int | None = None) -> subprocess.Popen[str]:
        """Starts the command line."""

        def limit() -> None:
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        return subprocess.Popen(
            [sys.executable, "-m", "finetune", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment(self.folder), start_new_session=True, preexec_fn=limit,
        )  # fmt: skip

    def fault_of(self, name: str, ended: Ended) -> str:
        """Returns what is wrong with a run that should have ended like the undisturbed one; empty if nothing is."""
        if ended.code:
            return f"exit code {ended.code}: {ended.output[-300:].strip()}"
        found = hashes(self.root / name)
        differing = sorted(file for file in self.wanted if found.get(file) != self.wanted[file])
        if differing:
            return f"other bytes in {', '.join(differing)}"
        left = [str(path.relative_to(self.root / name)) for path in leftovers(self.root / name)]
        return f"left behind: {', '.join(left)}" if left else ""


def hashes(run: Path) -> dict[str, str]:
    """Returns the SHA-256 of each product of a run."""
    files = (file for pattern in PRODUCTS for file in sorted(run.glob(pattern)))
    return {str(file.relative_to(run)): file_sha256(file, reuse=False) for file in files}


def leftovers(run: Path) -> Iterator[Path]:
    """Yields what an ended run must not leave: unfinished products and temporary files."""
    for path in run.rglob("*"):
        if path.name.startswith(".") or path.name.endswith((".tmp", ".partial")):
            yield path


def killed(ground: Ground, name: str, chance: random.Random) -> str:
    """Kills a run twice at random moments, then finishes it."""
    for _ in range(2):
        ground.run(name, kill_after=chance.uniform(1, ground.seconds))
    return ground.fault_of(name, ground.run(name))


def damaged(ground: Ground, name: str, chance: random.Random) -> str:
    """Changes a byte of a product of a finished run, and runs the stage that reads it again."""
    run, source = ground.root / name, ground.root / "undisturbed"
    shutil.copytree(source, run)
    files = sorted(file for pattern in DAMAGED for file in run.glob(pattern) if file.stat().st_size)
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    place = chance.randrange(len(content))
    content[place] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    stage = NEXT[file.relative_to(run).parts[0]]
    process = ground.command([stage, f"run.name={name}", f"run.root={ground.root}"])
    output, _ = process.communicate(timeout=SECONDS)
    ended = Ended(code=process.returncode, output=output)
    what = f"byte {place} of {file.relative_to(run)}, then {stage}"
    if not ended.has_one_message():
        return f"{what}: exit code {ended.code}: {ended.output[-300:].strip()}"
    return "" if "sha256" in ended.output or "SHA-256" in ended.output else f"{what}: {ended.output[-300:].strip()}"


def full_disk(ground: Ground, name: str, chance: random.Random) -> str:
    """Limits the size of files, as a full disk would, and finishes the run without the limit."""
    limit = int(10 ** chance.uniform(3, 6.5))
    ended = ground.run(name, largest_file=limit)
    if ended.code and not ended.has_one_message():
        return f"files of at most {limit} bytes: exit code {ended.code}: {ended.output[-300:].strip()}"
    return ground.fault_of(name, ground.run(name))


def twins(ground: Ground, name: str, chance: random.Random) -> str:
    """Starts the same run twice at once: one refuses, the other ends."""
    first = ground.start(name)
    time.sleep(chance.uniform(0, ground.seconds / 2))
    second = ground.run(name)
    output, _ = first.communicate(timeout=SECONDS)
    codes = sorted((first.returncode, second.code))
    if codes not in ([0, EXIT_USAGE], [0, 0]):  # both end well where the first is done before the second looks
        return f"exit codes {codes}: {output[-200:].strip()} | {second.output[-200:].strip()}"
    return ground.fault_of(name, Ended(code=0, output=""))


KINDS: dict[str, Callable[[Ground, str, random.Random], str]] = {
    "kills": killed,
    "damages": damaged,
    "disks": full_disk,
    "twins": twins,
}


def soak(settings: Soak, folder: Path) -> dict[str, dict[str, int]]:
    """Runs all trials and returns how many of each kind were tried and survived."""
    ground, chance = Ground(folder), random.Random(settings.seed)
    counts = {}
    for kind, trial in KINDS.items():
        faults = []
        for number in range(getattr(settings, kind)):
            name = f"{kind}-{number}"
            fault = trial(ground, name, chance)
            faults += [fault] if fault else []
            log("soak", f"{name}: {fault or 'survived'}")
            shutil.rmtree(ground.root / name, ignore_errors=True)
        counts[kind] = {"tried": getattr(settings, kind), "survived": getattr(settings, kind) - len(faults)}
    return counts


def read_soak(arguments: Sequence[str]) -> Soak:
    """Reads ``name=number`` arguments.

    Raises:
        ConfigError: One has another form or name.
    """
    values = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in {field.name for field in fields(Soak)} or not value.isdigit():
            known = ", ".join(field.name for field in fields(Soak))
            raise ConfigError(f"benchmarks.soak: {argument!r} is not name=number; names are {known}")
        values[name] = int(value)
    return Soak(**values)


def main() -> int:
    try:
        settings = read_soak(sys.argv[1:])
    except ConfigError as error:
        return print_error(error, error.exit_code)
    with tempfile.TemporaryDirectory(prefix="finetune-soak-") as folder:
        counts = soak(settings, Path(folder))
    print(json.dumps(counts))
    return int(any(count["tried"] != count["survived"] for count in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
