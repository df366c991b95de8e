"""Walks a recipe's whole line on this CPU, with a base of its size and under a memory cap::

    python -m benchmarks.walk experiment=llama7b_qlora memory_gib=12

Makes a base of the recipe's architecture with random weights, all layers, and a tokenizer of its class; then runs the
real command line: 3 steps of 256 tokens, merge, evaluation on a few rows, GGUF, report. The last line is JSON. Settings
of `Walk` and overrides of finetune may follow in any order; the latter come after the walk's own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # where it is started as a file

from benchmarks.walk_memory import CappedResult, Sample, run_capped
from benchmarks.walk_rows import write_rows
from finetune.config import RunConfig, load
from finetune.console import human_bytes, log, print_error
from finetune.errors import ConfigError, FinetuneError
from finetune.files import require_disk
from finetune.parameters import parameters
from finetune.run import STAGES
from finetune.train.config import AUTO

ROOT = Path(__file__).parents[1]
GIB = 1024**3
STEPS, TOKENS = 3, 256
DIMENSIONS = "model.architecture."
MIXTURE = ("model.dtype=float32", "export.adapter.max_kl=0.05")
"""Routers of random weights nearly tie, and choose other experts where bfloat16 rounds, as bitsandbytes' packed kernel
for CPUs does in plain peft even in float32."""
TRAINING_ROWS, HELDOUT_ROWS = 48, 4
BYTES_PER_PARAMETER = 9
"""Disk at the worst moment: the base (2), its quantized copy (0.6), two merge candidates (4) or the merged model, its
export and GGUF (5.1), and what the file system keeps free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Walk:
    """What to walk.

    Attributes:
        experiment: Of conf/experiment.
        memory_gib: Cap on the memory of the run, in GiB.
        size: ``full``, or ``tiny``: two narrow layers of the same class.
        folder: Where to work; a folder is made in it.
        keep: Whether to leave base and run there.
        resume: The kept folder of a walk that was stopped; its base and its finished stages are used.
        overrides: Further settings of finetune.
        dimensions: Settings of the base's dimensions, e.g. ``model.architecture.layers=5``.
    """

    experiment: str
    memory_gib: float = 12.0
    size: str = "full"
    folder: Path = Path(tempfile.gettempdir())
    keep: bool = False
    resume: Path | None = None
    overrides: tuple[str, ...] = ()
    dimensions: tuple[str, ...] = ()


def read_walk(arguments: Sequence[str]) -> Walk:
    """Reads ``name=value`` arguments; those that are not of `Walk` are overrides of finetune.

    Raises:
        ConfigError: An argument is missing or has another form.
    """
    settings: dict[str, Any] = {}
    overrides = []
    types: dict[str, Callable[[str], Any]] = {
        "memory_gib": float,
        "folder": Path,
        "resume": Path,
        "keep": lambda text: {"true": True, "false": False}[text],
    }
    own = {field.name for field in fields(Walk)} - {"overrides", "dimensions"}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(
                f"benchmarks.walk: {argument!r} is not of the form name=value; see the module's docstring"
            )
        if name not in own:
            overrides.append(argument)
            continue
        try:
            settings[name] = types.get(name, str)(value)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"benchmarks.walk: {name}={value} cannot be read ({error})") from error
    if "experiment" not in settings:
        raise ConfigError("benchmarks.walk: experiment=<name> is missing; the names are in conf/experiment")
    if settings.get("size", "full") not in ("full", "tiny"):
        raise ConfigError(f"benchmarks.walk: size must be full or tiny; got {settings['size']!r}")
    dimensions = tuple(override for override in overrides if override.startswith(DIMENSIONS))
    others = tuple(override for override in overrides if override not in dimensions)
    return Walk(**settings, overrides=others, dimensions=dimensions)


def walk(settings: Walk) -> dict[str, Any]:
    """Makes the base, runs the line under the cap, and returns the result that is printed as JSON.

    Raises:
        FinetuneError: The recipe cannot be composed, or the disk is too small.
    """
    recipe = load([f"+experiment={settings.experiment}", *settings.dimensions])
    settings.folder.mkdir(parents=True, exist_ok=True)
    work = settings.resume or Path(tempfile.mkdtemp(prefix=f"walk-{settings.experiment}-", dir=settings.folder))
    try:
        count = made_base(recipe, settings, work)
        command = [sys.executable, "-m", "finetune", *overrides(recipe, settings, work), "run.if_exists=resume"]
        log("walk", f"capped at {settings.memory_gib:g} GiB: {' '.join(command[1:])}")
        cap = int(settings.memory_gib * GIB)
        ended = run_capped(command, cap_bytes=cap, environment=environment(work), folder=work)
        result = describe(settings, ended, run=work / "outputs" / "walk", parameters=count)
    finally:
        if not settings.keep:
            shutil.rmtree(work, ignore_errors=True)
    return result


def environment(work: Path) -> dict[str, str]:
    """Returns the environment of a run of this source tree, with a cache of its own and without the hub."""
    own = {"PYTHONPATH": str(ROOT), "FINETUNE_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1"}
    return os.environ | own


def made_base(recipe: RunConfig, settings: Walk, work: Path) -> int:
    """Makes the base in ``work``, where it is not there yet; returns the number of its parameters.

    Raises:
        ConfigError: The disk is too small.
    """
    from benchmarks.walk_base import make_base, shrunk

    if settings.resume and recipe.model.architecture:
        made = recipe.model.architecture
        return parameters(shrunk(made) if settings.size == "tiny" else made)
    if settings.size == "full" and recipe.model.architecture:
        need = BYTES_PER_PARAMETER * parameters(recipe.model.architecture)
        require_disk(work, need, "benchmarks.walk", remedy="free some, or choose another folder=", error=ConfigError)
    return make_base(recipe, work / "base", tiny=settings.size == "tiny")


def overrides(recipe: RunConfig, settings: Walk, work: Path) -> list[str]:
    """Returns the settings of the run: the recipe's own, and what a CPU without a network needs."""
    rows = write_rows(work, recipe.data.format, training=TRAINING_ROWS, heldout=HELDOUT_ROWS)
    return [
        f"+experiment={settings.experiment}",
        f"model.name={work / 'base'}",
        f"model.attention={recipe.model.attention}",  # of another folder's model the option says nothing
        *([f"model.template={recipe.model.template}"] if recipe.model.template else []),
        f"run.root={work / 'outputs'}",
        "run.name=walk",
        *rows,
        *(["data.heldout_rows=null"] if recipe.data.heldout_rows else []),
        f"data.max_tokens={TOKENS}",
        *([f"data.pack_tokens={TOKENS}"] if recipe.data.packing else []),
        f"train.steps={STEPS}",
        f"train.tokens_per_step={TOKENS * recipe.launch.processes}",
        "train.rows_per_step=null",
        *(["train.micro_batch=1"] if recipe.train.micro_batch != AUTO else []),
        f"train.evaluation_rows={HELDOUT_ROWS}",
        "train.evaluations=1",
        "train.checkpoints=1",
        "merge.measure_tokens=60",
        "eval.rows=2",
        f"eval.loss_rows={HELDOUT_ROWS}",
        "eval.max_new_tokens=8",
        "eval.general_text=null",
        f"export=[{','.join(exports(recipe))},card]",
        *(f"export.{name}.{setting}" for name in exports(recipe) for setting in ("max_new_tokens=8", "logit_rows=1")),
        "tracking=[]",
        "hardware.device=cpu",
        *(MIXTURE if recipe.model.architecture and recipe.model.architecture.experts else ()),
        *(["launch.offload=false"] if recipe.launch.offload else []),
        *settings.overrides,
    ]


def exports(recipe: RunConfig) -> list[str]:
    """Returns the exports of a walk: GGUF where its export knows the recipe's family.

    llama.cpp's server reads the channels of gpt-oss out of its answers, and refuses those of random weights. Routers of
    random weights nearly tie, and choose other experts under 8-bit rounding: a mixture is exported in 16 bits.
    """
    from finetune.export.gguf.architecture import ARCHITECTURES

    architecture = recipe.model.architecture
    family = architecture.family if architecture else "llama"
    known = family in ARCHITECTURES and family != "gpt_oss"
    gguf = "gguf_f16" if architecture and architecture.experts else "gguf_q8_0"
    return ["adapter", "safetensors", *([gguf] if known else [])]


def describe(settings: Walk, ended: CappedResult, *, run: Path, parameters: int) -> dict[str, Any]:
    """Returns the result: what the run reached, its time and memory by stage."""
    return {
        "experiment": settings.experiment,
        "size": settings.size,
        "resumed": settings.resume is not None,
        "parameters": parameters,
        "cap_bytes": int(settings.memory_gib * GIB),
        "capped_by": ended.capped_by,
        "peak_rss_bytes": ended.peak_rss_bytes,
        "peak_anonymous_bytes": ended.peak_anonymous_bytes,
        "stages": stages(run, ended.samples),
        "exit_code": ended.code,
        "over_the_cap": ended.is_over,
        "ok": ended.code == 0 and not ended.is_over and ended.peak_anonymous_bytes <= settings.memory_gib * GIB,
    }


def stages(run: Path, samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Returns the seconds and the peaks of each stage that began; ``seconds`` is None for one that did not end."""
    began: dict[str, float] = {}
    file = run / "memory.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        entry = json.loads(line)
        began.setdefault(entry["stage"], entry["time"])
    order = sorted(began, key=began.__getitem__)
    ends = [*(began[stage] for stage in order[1:]), float("inf")]
    found = {}
    for stage, end in zip(order, ends, strict=True):
        inside = [sample for sample in samples if began[stage] <= sample.time < end]
        manifest = run / stage / "manifest.json"
        found[stage] = {
            "seconds": json.loads(manifest.read_text())["seconds"] if manifest.is_file() else None,
            "peak_bytes": max((sample.rss_bytes for sample in inside), default=0),
            "peak_anonymous_bytes": max((sample.anonymous_bytes for sample in inside), default=0),
        }
    return {stage: found[stage] for stage in STAGES if stage in found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Walks, prints the result as the last line, and returns 0 where the whole line was walked under the cap."""
    try:
        result = walk(read_walk(sys.argv[1:] if arguments is None else arguments))
    except FinetuneError as error:
        return print_error(error, error.exit_code)
    peaks = f"{human_bytes(result['peak_anonymous_bytes'])} allocated, {human_bytes(result['peak_rss_bytes'])} resident"
    log("walk", f"{'walked' if result['ok'] else 'failed'}: peak {peaks}, cap {human_bytes(result['cap_bytes'])}")
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
