"""From the command line to an exit code: ``python -m finetune [verb] [overrides]``."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from finetune.config import CONF, RunConfig, compose_config, explain_all, load, make, register
from finetune.console import log, print_error
from finetune.errors import ConfigError, FinetuneError, GateMissed, Interrupted, RankFailed
from finetune.hardware.busy import CpuUsage, yield_to_busy_cpu
from finetune.launch import Ranks, as_launched, start
from finetune.launch.start import exit_process, must_start
from finetune.overrides import opened
from finetune.run import STAGES
from finetune.verbs import LOOKS, recorded, split_own, sweep, with_experiment

STAGE_VERBS = ("train", "merge", "eval", "export", "report")
"""One stage of a run that exists, done again with those that build on it."""

LOOK_VERBS = {"data": "data", "preflight": "preflight"}
"""Verbs that stop early and work in a folder of their own, so that the run's name stays free."""

LAUNCHED = ("run", "train")
"""Verbs whose work several processes share; the others are one process's, whatever ``launch`` says."""

VERBS = ("run", "plan", "bench", "replay", "diff", *LOOK_VERBS, *STAGE_VERBS)
STARTED = CpuUsage.now()
DONE, OURS, YOURS, INTERRUPTED = 0, 1, 2, 75


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 done; 2 the user can mend it; 1 our fault or the machine's (with a traceback); 75 stopped by a signal, saved.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # before training takes signals over, TERM ends as INT does
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments.pop(0) if arguments and arguments[0] in VERBS else "run"
    try:
        if verb != "bench" and any(argument.startswith("-") for argument in arguments):
            return with_hydra(verb, arguments)
        return dispatch(verb, arguments)
    except FinetuneError as error:
        return print_error(error, YOURS)
    except GateMissed as missed:
        return print_error(missed, OURS)
    except RankFailed as failed:
        return print_error(failed, failed.code)
    except Interrupted as stop:
        return print_error(stop, INTERRUPTED)
    except KeyboardInterrupt:
        return print_error("stopped; go on with run.if_exists=resume", INTERRUPTED)


def dispatch(verb: str, arguments: list[str]) -> int:
    """A command without Hydra's own flags."""
    if verb == "bench":
        from finetune.bench import bench

        bench(arguments)
        return DONE
    own, overrides = split_own(verb, arguments)
    words = [word for word in overrides if "=" not in word and not word.startswith("~")]
    if words and verb != "diff":
        known = f"no setting (write key=value) and no verb ({', '.join(VERBS)}), which would stand first"
        raise ConfigError(*[f"{word}: it is {known}" for word in words])
    for setting in (*own, ""):
        if (verb, setting) in LOOKS:
            return DONE if LOOKS[verb, setting](own, overrides) else OURS
    if verb in STAGE_VERBS:
        overrides = [*recorded(overrides), *overrides]
    return execute(verb, load(with_experiment(overrides)), overrides=with_experiment(overrides), own=own)


def execute(verb: str, config: RunConfig, *, overrides: list[str], own: dict[str, str]) -> int:
    """A composed command."""
    if verb == "plan":
        from finetune.hardware import probe
        from finetune.plan import plan, show, with_options
        from finetune.provenance import idle

        config.plan = with_options(config.plan, own)
        show(plan(config, probe(config.hardware)))
        log("plan", *idle(config, overrides))
        return DONE
    if verb in LAUNCHED:
        asked, config.launch = config.launch, as_launched(config.launch)
        problems = (
            list(config.problems()) if config.launch is not asked else []
        )  # a launcher may have brought another strategy
        if problems:
            raise ConfigError(*problems)
        if must_start(config.launch):
            return start(config.launch, [verb, *overrides])
    yield_to_busy_cpu(STARTED)
    gc.disable()  # until the model is there: looking through a million objects that stay takes a tenth of the start
    if verb in LOOK_VERBS:
        config.run.name, config.run.until, config.run.if_exists = (
            f"{config.run.name}-{verb}",
            LOOK_VERBS[verb],
            "overwrite",
        )
    if verb in STAGE_VERBS:
        config.run.if_exists = "resume"
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        config.run.if_exists = "resume"  # started again after a failure: what stands is this launch's own
    again = frozenset(STAGES[STAGES.index(verb) :]) if verb in STAGE_VERBS else frozenset()
    work(config, overrides=overrides, again=again)
    return DONE


def work(config: RunConfig, *, overrides: list[str], again: frozenset[str]) -> None:
    """The line, alone or as one process of several."""
    from finetune.pipeline import run, run_worker

    launch = config.launch
    ranks = Ranks(heartbeat_timeout_seconds=launch.heartbeat_timeout_seconds, shards=launch.strategy == "fsdp", offload=launch.offload)
    try:
        if ranks.is_main:
            run(config, overrides=overrides, ranks=ranks, redo=again)
            ranks.put("data", False)
            ranks.shutdown()
        else:
            run_worker(config, ranks=ranks)
    except BaseException as error:
        explained = ranks.final_error(error)
        if explained is error:
            raise
        raise explained from error


def with_hydra(verb: str, arguments: list[str]) -> int:
    """A command with Hydra's own flags: ``--cfg``, ``--help``, ``--info``, ``--multirun``, ``--config-dir``, completion."""
    if {"--multirun", "-m"} & set(arguments):
        if verb == "run":
            return DONE if sweep(with_experiment(arguments)) else OURS
        if verb != "plan":
            raise ConfigError(
                f"--multirun: each job is a whole run, or a plan; finetune {verb} takes one run at a time"
            )
    import hydra
    from hydra.core.hydra_config import HydraConfig

    register()
    overrides = [argument for argument in arguments if not argument.startswith("-") and "=" in argument]
    added = with_experiment(overrides)[: len(with_experiment(overrides)) - len(overrides)]
    results: list[int] = []

    @hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
    def task(config: DictConfig) -> None:
        results.append(execute(verb, make(config), overrides=list(HydraConfig.get().overrides.task), own={}))

    os.environ["HYDRA_FULL_ERROR"] = "1"
    before, sys.argv = sys.argv, ["finetune", *opened(arguments, RunConfig), *added]
    try:
        task()
    except (HydraException, OmegaConfBaseException) as error:
        compose_config([*added, *overrides])
        raise ConfigError(*explain_all(error)) from error
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return max(results, default=DONE)


if __name__ == "__main__":
    exit_process(main())
