"""Hydra's own flags after a command: ``--cfg``, ``--info``, ``--multirun``, completion."""

from __future__ import annotations

import os
import sys

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from finetune.cli.command import Invocation
from finetune.cli.run import print_plan
from finetune.config import RunConfig, compose, load
from finetune.config.compose import as_config_error, register, with_model_option
from finetune.config.overrides import SEARCH_PATH, allow_free_keys, is_sweep
from finetune.errors import EXIT_FAILURE, EXIT_OK, ConfigError
from finetune.paths import CONF

MULTIRUN = ("--multirun", "-m")
SHOWING = ("--cfg", "-c", "--info", "-i")
"""Flags that print a configuration, which is the one that a run would have."""


def run_with_hydra(invocation: Invocation) -> int:
    """Runs a command whose flags are Hydra's.

    Raises:
        ConfigError: The configuration is wrong, or the command does not take ``--multirun``.
    """
    flags, command = invocation.hydra_flags, invocation.command.name
    given = invocation.given()
    if given:
        raise ConfigError(f"--{given[0].name} does not go with {flags[0]}; leave one of them out")
    if set(MULTIRUN) & set(flags):
        others = [flag for flag in flags if flag not in MULTIRUN]
        others += ["--config-dir" for word in invocation.overrides if word.startswith(SEARCH_PATH)]
        if others:
            raise ConfigError(f"{others[0]} does not go with --multirun: the jobs are started without it")
        if command == "run":
            return _sweep(invocation)
        if command != "plan":
            raise ConfigError(
                f"--multirun: each job is a whole run, or a plan; finetune {command} takes one run at a time"
            )
    if "--hydra-help" in flags:
        return _call_hydra(flags, [])
    shows = any(flag.partition("=")[0] in SHOWING for flag in flags)
    return _call_hydra(flags, with_model_option(invocation.overrides) if shows else invocation.overrides)


def _sweep(invocation: Invocation) -> int:
    """Runs the jobs one after the other and prints their table; fails where one failed."""
    from finetune.report.sweep import report_sweep
    from finetune.sweep.multirun import sweep

    return EXIT_OK if report_sweep(sweep(invocation.overrides)) else EXIT_FAILURE


def _call_hydra(flags: list[str], overrides: list[str]) -> int:
    """Lets Hydra read the flags. It prints what they ask for, or with ``--multirun`` plans each job."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    register()

    @hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
    def plan_job(_: DictConfig) -> None:
        words = list(HydraConfig.get().overrides.task)
        print_plan(load(words), words)

    os.environ["HYDRA_FULL_ERROR"] = "1"
    before, sys.argv = sys.argv, ["finetune", *flags, *allow_free_keys(overrides, RunConfig)]
    try:
        plan_job()
    except (HydraException, OmegaConfBaseException) as error:
        # This raises the problem in our form where a single override causes it.
        compose([override for override in overrides if not is_sweep(override)])
        raise as_config_error(error) from error
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return EXIT_OK
