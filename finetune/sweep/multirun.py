"""Turns ``--multirun`` into jobs: checks all before the first starts; Hydra's sweeper and launcher then run them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.config import RunConfig, load
from finetune.config.compose import as_config_error, register
from finetune.config.overrides import allow_free_keys, group_options
from finetune.console import log
from finetune.errors import ConfigError, Interrupted
from finetune.launch.config import process_count
from finetune.paths import CONF
from finetune.run import write_json
from finetune.sweep.median import require_optuna
from finetune.sweep.work import Sweep

SWEEP_KEYS = (
    "run.name",
    "run.root",
    "run.if_exists",
    "sweep.name",
    "sweep.prune",
    "sweep.prune_after_jobs",
    "sweep.prune_after_steps",
)
"""Settings of the sweep as a whole, not of a job."""

PLUGINS = {"optuna": "optuna", "tpe": "optuna", "submitit": "slurm", "slurm": "slurm", "local": "slurm", "ray": "ray"}
"""First word of an option of ``hydra/sweeper`` or ``hydra/launcher`` to the extra that installs it."""


def sweep(overrides: Sequence[str]) -> Path:
    """Runs the jobs of a command line.

    Args:
        overrides: With several values for some settings, and with an experiment; Hydra's own settings are among them.

    Returns:
        The sweep's folder.

    Raises:
        ConfigError: Any job's configuration is wrong, or the folder is another command's; nothing was started.
        Interrupted: A signal came; the jobs that ran have saved.
    """
    register()
    words = allow_free_keys(overrides, RunConfig)
    if process_count() > 1:
        raise ConfigError(
            "--multirun starts the jobs itself: run it without torchrun or accelerate launch, and "
            "give the jobs launch=ddp"
        )
    settings, is_grid = _parse(words)
    varied = [override for override in settings if override.is_sweep_override()]
    fixed = [override for override in settings if not override.is_sweep_override()]
    config = _first_config(varied, fixed, is_grid=is_grid)
    if config.sweep.prune:
        require_optuna()
    folder = Path(config.run.root).resolve() / (config.sweep.name or f"{config.run.name}-sweep")
    _claim(folder, [_word(override) for override in fixed if override.key_or_group not in SWEEP_KEYS])
    keys = ", ".join(override.key_or_group for override in varied)
    log("sweep", f"{keys} in {folder}: a folder for each job, with its log.txt; the same command continues")
    plan = Sweep(folder=folder, fixed=frozenset(override.get_key_element() for override in fixed), config=config.sweep)
    try:
        _run_hydra_sweeper(["--multirun", *words, f"hydra.sweep.dir={folder / '.hydra'}"], plan)
    except KeyboardInterrupt:
        raise Interrupted(f"sweep: stopped; the same command continues with what is missing in {folder}") from None
    return folder


def _parse(words: Sequence[str]) -> tuple[list[Override], bool]:
    """Returns the jobs' settings, those of ``hydra.sweeper.params`` among them, and whether every combination is a job.

    Raises:
        ConfigError: A word cannot be read, or names a plugin of Hydra's that is not installed.
    """
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        try:
            parsed = parser.parse_overrides(list(words))
            of_hydra = [_word(override) for override in parsed if override.is_hydra_override()]
            chosen = compose("config", overrides=of_hydra, return_hydra_config=True).hydra
            params: Any = OmegaConf.to_container(chosen.sweeper.get("params") or OmegaConf.create({}))
            more = parser.parse_overrides([f"{key}={value}" for key, value in params.items()])
        except (HydraException, OmegaConfBaseException) as error:
            missing = list(_missing_plugins(words)) if isinstance(error, MissingConfigException) else []
            raise (ConfigError(*missing) if missing else as_config_error(error)) from error
    if chosen.launcher["_target_"].endswith(".SlurmLauncher") and not shutil.which("srun"):
        raise ConfigError(
            "hydra/launcher: Slurm's srun is not found here; start the sweep on a login node, or "
            "choose hydra/launcher=local"
        )
    of_jobs = {
        override.get_key_element(): override for override in [*more, *parsed] if not override.is_hydra_override()
    }
    return list(of_jobs.values()), chosen.sweeper["_target_"].endswith(".BasicSweeper")


def _missing_plugins(words: Sequence[str]) -> Iterator[str]:
    """Yields why an option of ``hydra/launcher`` or ``hydra/sweeper`` does not exist, or which plugin it needs."""
    for group, _, option in (word.partition("=") for word in words if word.startswith("hydra/")):
        extra = PLUGINS.get(option.partition("_")[0])
        options = ", ".join(["basic", *group_options(group, [CONF])])
        if extra:
            install = f"pip install 'finetune-qlora[{extra}]'"
            yield f"{group}={option} needs a plugin of Hydra's that is not installed; run: {install}"
        elif option != "basic":
            yield f"{group}={option}: there is no such option; choose one of {options}, or one of a plugin of Hydra's"


def _first_config(varied: Sequence[Override], fixed: Sequence[Override], *, is_grid: bool) -> RunConfig:
    """Composes the configuration of every job and returns the first.

    Args:
        is_grid: Every combination is a job. Otherwise a sampler proposes them, and each value is tried with the first
            values of the others.

    Raises:
        ConfigError: With the problems of all jobs.
    """
    problems: dict[str, list[str]] = {}
    for override in varied:
        if override.key_or_group in SWEEP_KEYS:
            problems[f"{override.key_or_group} belongs to the whole sweep and cannot be swept; give it one value"] = []
    if not varied:
        problems["--multirun needs a setting with several values, e.g. lora.rank=8,16,32"] = []
    first: RunConfig | None = None
    values = [[f"{override.get_key_element()}={value}" for value in _values(override)] for override in varied]
    count = 0
    for job in [] if problems else itertools.product(*values) if is_grid else _one_at_a_time(values):
        count += 1
        try:
            job_config = load([*[_word(override) for override in fixed], *job])
            first = first or job_config
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(" ".join(job))
    if problems:
        raise ConfigError(*[_in_jobs(problem, jobs, count) for problem, jobs in problems.items()])
    assert first is not None
    return first


def _in_jobs(problem: str, jobs: list[str], count: int) -> str:
    return (
        problem
        if len(jobs) in (0, count)
        else f"{problem} (in the job{'s' if len(jobs) > 1 else ''} {', '.join(jobs)})"
    )


def _values(override: Override) -> list[str]:
    """Returns the values of a swept setting: all, or the two ends of an interval."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    return list(override.sweep_string_iterator())


def _one_at_a_time(values: Sequence[Sequence[str]]) -> Iterator[tuple[str, ...]]:
    start = tuple(options[0] for options in values)
    yield start
    for index, options in enumerate(values):
        yield from ((*start[:index], option, *start[index + 1 :]) for option in options[1:])


def _claim(folder: Path, fixed: list[str]) -> None:
    """Saves the settings that all jobs share, so that no other command adds jobs that cannot be compared."""
    file = folder / "sweep.json"
    if (folder / "config.yaml").is_file():
        raise ConfigError(f"sweep.name: {folder} holds a run; give another sweep.name")
    before = json.loads(file.read_text(encoding="utf-8"))["fixed"] if file.is_file() else fixed
    if sorted(before) != sorted(fixed):
        raise ConfigError(
            f"sweep.name: {folder} was made with {' '.join(before)} and this command says {' '.join(fixed)}; "
            "give the same settings to continue, or another sweep.name"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {"fixed": fixed})


def _word(override: Override) -> str:
    return override.input_line or ""


def _run_hydra_sweeper(words: list[str], plan: Sweep) -> None:
    """Lets Hydra's sweeper and launcher call `Sweep.do` for each job."""

    @hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
    def task(config: DictConfig) -> float:
        settings: Any = HydraConfig.get()
        return plan.run_job(list(settings.overrides.task), number=int(settings.job.num))

    os.environ["HYDRA_FULL_ERROR"] = "1"
    before, sys.argv = sys.argv, ["finetune", *words]
    try:
        task()
    except (HydraException, OmegaConfBaseException) as error:
        raise as_config_error(error) from error
    finally:
        sys.argv = before
