"""Commands that plan or run stages."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.cli.command import Invocation
from finetune.cli.settings import saved_overrides
from finetune.config import RunConfig, load
from finetune.console import be_quiet, log
from finetune.errors import EXIT_FAILURE, EXIT_OK, ConfigError
from finetune.hardware.busy import CpuUsage, yield_to_busy_cpu
from finetune.hardware.gpus import allocator_variables
from finetune.launch import Ranks, as_launched, start
from finetune.launch.start import must_start
from finetune.run import STAGES, to_jsonable


def show_plan(invocation: Invocation) -> int:
    """Prints the plan of a configuration."""
    options = invocation.options
    flags = [f"plan.{name}=true" for name in ("fit", "exact") if options[name]]
    config = load([*invocation.overrides, *flags])
    print_plan(config, invocation.overrides, as_json=options["json"], verbose=options["verbose"])
    return EXIT_OK


def print_plan(config: RunConfig, overrides: Sequence[str], *, as_json: bool = False, verbose: bool = False) -> None:
    """Prints the plan, what could not be checked yet, and settings without effect; as JSON, one document alone."""
    from finetune.checks import Start, check_before_start
    from finetune.hardware import place, probe
    from finetune.plan import plan, show
    from finetune.provenance import unused_overrides

    machine = probe(config.hardware)
    unchecked = check_before_start(
        Start(config=config, machine=machine, placement=place(machine, config), is_plan=True)
    )
    planned, unused = plan(config, machine), list(unused_overrides(config, overrides))
    if as_json:
        names = {"run": config.run.name, "model": config.model.name, "hardware": config.hardware.name}
        document = {**names, **to_jsonable(planned), "not_checked": unchecked, "unused_settings": unused}
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        return
    show(planned, verbose=verbose)
    log("plan", *unchecked, *unused)
    if planned.known and not verbose:
        log("plan", "finetune plan --verbose prints the bytes of each phase, --fit proposes settings")


def run_stages(invocation: Invocation) -> int:
    """Runs the stages that a command stands for, here or in the processes of a launch."""
    before_composing = CpuUsage.now()
    command, overrides = invocation.command, invocation.overrides
    is_quiet = invocation.options["quiet"]
    be_quiet(is_quiet)
    if command.redo_from:
        overrides = [*saved_overrides(overrides), *overrides]
    config = load(overrides)
    if command.distributed:
        _follow_launcher(config)
        if must_start(config.launch):
            return start(config.launch, [command.name, *overrides, *(["--quiet"] if is_quiet else [])])
    yield_to_busy_cpu(before_composing)
    os.environ.update(allocator_variables())
    if command.preview:
        config.run.name = f"{config.run.name}-{command.name}"
        config.run.until, config.run.if_exists = command.name, "overwrite"
    # Started again after a failure, a run in the folder is this launch's own.
    if command.redo_from or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        config.run.if_exists = "resume"
    redo = frozenset(STAGES[STAGES.index(command.redo_from) :]) if command.redo_from else frozenset()
    _run_pipeline(config, overrides, redo)
    return EXIT_OK


def replay(invocation: Invocation) -> int:
    """Runs a finished run again and compares the two; fails where it does not come out as it did."""
    from functools import partial

    from finetune import provenance
    from finetune.environment import describe_here
    from finetune.pipeline import run

    values = invocation.setting_values()
    if "run.name" not in values:
        raise ConfigError("replay: give run.name=<a finished run>; got none")
    outcome = provenance.replay(
        Path(values.get("run.root", "outputs")) / values["run.name"],
        run=partial(run, ranks=Ranks({})),
        describe_environment=describe_here,
        force=invocation.options["force"],
    )
    return EXIT_OK if outcome.holds else EXIT_FAILURE


def _run_pipeline(config: RunConfig, overrides: list[str], redo: frozenset[str]) -> None:
    """Runs the stages, alone or as one process of several."""
    from finetune.pipeline import run, run_worker

    launch = config.launch
    ranks = Ranks(
        heartbeat_timeout_seconds=launch.heartbeat_timeout_seconds,
        shards=launch.strategy == "fsdp",
        offload=launch.offload,
    )
    try:
        if ranks.is_main:
            run(config, overrides=overrides, ranks=ranks, redo=redo)
            ranks.put("data", False)
            ranks.shutdown()
        else:
            run_worker(config, ranks=ranks)
    except BaseException as error:
        explained = ranks.final_error(error)
        if explained is error:
            raise
        raise explained from error


def _follow_launcher(config: RunConfig) -> None:
    """Takes over the number of processes of torchrun or accelerate launch, which may imply another strategy."""
    launch = as_launched(config.launch)
    if launch is not config.launch:
        config.launch = launch
        problems = list(config.problems())
        if problems:
            raise ConfigError(*problems)
