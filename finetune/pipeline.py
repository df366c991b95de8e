"""The line: the only file that knows the order of the stages."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from finetune import environment, hardware, lora, model
from finetune.account import tell_unread, watch
from finetune.config import RunConfig, to_dict, to_yaml
from finetune.console import human_bytes, quiet_libraries, say
from finetune.data import prepare
from finetune.errors import GateMissed, HardwareError
from finetune.eval import score
from finetune.export import export
from finetune.hardware import Machine, Placement
from finetune.measure import free
from finetune.merge import merge
from finetune.plan import plan, show
from finetune.quantization import spec
from finetune.rehearse import Ahead, rehearse
from finetune.report import report
from finetune.run import RunFolder, plain, write_json
from finetune.speed import quicken
from finetune.tracking import Trackers, figures, open_trackers
from finetune.train import fit

if TYPE_CHECKING:
    from finetune.data import PreparedData
    from finetune.model import Base
    from finetune.speed import Quick


def run(config: RunConfig, *, overrides: Sequence[str], again: frozenset[str] = frozenset()) -> RunFolder:
    """Takes a configuration to a run folder, up to ``run.until``.

    Args:
        config: Composed and checked.
        overrides: What the user typed, kept so that a later verb can compose the same again.
        again: Stages to do again although they are done.

    Raises:
        FinetuneError: The user can mend it.
        Interrupted: A signal came; everything was saved.
        GateMissed: A threshold of ``eval.gate`` was not met; the report is written.
    """
    quiet_libraries()
    watch(config)
    machine = hardware.probe(config.hardware)
    placement = hardware.place(machine, config)
    refuse_what_is_only_planned(config)
    folder = RunFolder.open(config.run, again=again)
    with folder.lock():
        surroundings = environment.environment(machine, placement)
        is_new = not (folder.path / "config.yaml").exists()
        if is_new:
            write_record(folder, config, overrides=overrides, surroundings=surroundings)
        say("run", f"{folder.path}: {config.model.name}, {config.quantization.method}")
        say("hardware", *placement.reasons)
        trackers = open_trackers(config.tracking, run_name=config.run.name, folder=folder.path, run_config=to_dict(config))
        try:
            for stage in line(config, folder=folder, machine=machine, placement=placement, trackers=trackers):
                if stage == config.run.until:
                    break
            if not is_new:  # only now: settings that a finished stage refuses must not replace the ones it was made with
                write_record(folder, config, overrides=overrides, surroundings=surroundings)
            files = report(folder.path, status="complete" if config.run.until == "report" else "partial")
            publish(trackers, folder, files)
        finally:
            trackers.finish()
    if is_new and config.run.until == "report":  # a run that leaves stages out leaves their settings unread
        tell_unread(config)
    missed = (folder.manifest("eval") or {"product": {"missed": []}})["product"]["missed"]
    if missed:
        raise GateMissed("; ".join(missed))
    return folder


def surroundings(config: RunConfig) -> dict[str, Any]:
    """What environment.json would say if this configuration ran here and now."""
    machine = hardware.probe(config.hardware)
    return environment.environment(machine, hardware.place(machine, config))


def line(config: RunConfig, *, folder: RunFolder, machine: Machine, placement: Placement, trackers: Trackers) -> Iterator[str]:
    """Runs the stages in order and names each one when it is done."""
    seed = config.run.seed
    with folder.measured("plan") as facts:
        planned = plan(config, machine)
        facts.update(plain(planned))
    show(planned)
    yield "plan"

    set_threads(placement)
    base = model.fetch(config.model)
    tokenizer = model.load_tokenizer(base, trust_remote_code=config.model.trust_remote_code)
    say("model", model.padding(tokenizer))
    data = folder.once(prepare, config.data, tokenizer=tokenizer, seed=seed)
    yield "data"

    base_inputs: dict[str, Any] = {"base": base, "model": config.model, "quantization": config.quantization, "placement": placement}
    adapted = quick = None
    if not folder.is_done("rehearse") or not folder.is_done("train"):
        adapted, quick = adapt(config, folder=folder, base=base, data=data, placement=placement)
    gc.freeze()
    gc.enable()
    yield "model"

    shared: dict[str, Any] = {"data": data, "placement": placement, "seed": seed}
    graph = {
        "base": base,
        "quantization": spec(config.quantization),
        "lora": config.lora,
        "upcast": config.model.upcast,
        "speed": config.speed,
    }
    ahead = Ahead(
        train=config.train, optim=config.optim, model=config.model, quantization=config.quantization, until=config.run.until,
        make_trainer=make_trainer,
    )  # fmt: skip
    rehearsal = folder.once(rehearse, config.rehearse, adapted=adapted, tokenizer=tokenizer, quick=quick, ahead=ahead, **graph, **shared)
    if quick and not rehearsal.quick:
        quick.switch.on = False
    yield "rehearse"

    steps: dict[str, Any] = {"optim": config.optim, "trackers": trackers, "packing": rehearsal.isolates, "quick": quick}
    adapter = folder.once(fit, config.train, adapted=adapted, tokenizer=tokenizer, **steps, **graph, **shared)
    del adapted, quick, steps
    free()
    yield "train"

    merged = folder.once(merge, config.merge, adapter=adapter, data=data, seed=seed, **base_inputs)
    trackers.summary(figures("merge", merged))
    yield "merge"

    scores = folder.once(score, config.eval, adapter=adapter, merged=merged, data=data, seed=seed, **base_inputs)
    trackers.summary(figures("eval", scores))
    yield "eval"

    folder.once(export, config.export, adapter=adapter, merged=merged, scores=scores, data=data, seed=seed, **base_inputs)
    yield "export"


def adapt(config: RunConfig, *, folder: RunFolder, base: Base, data: PreparedData, placement: Placement) -> tuple[Any, Quick]:
    """The quantized base in memory with fresh adapters on it, and how its steps are computed."""
    with folder.measured("model") as facts:
        loaded = model.load(base, config.model, quantization=config.quantization, placement=placement)
        parameters, size = model.parameter_count(loaded), model.resident_bytes(loaded)
        say("model", f"{config.model.name}: {parameters:,} parameters in {human_bytes(size)} as {config.quantization.method}")
        eva = config.lora.variant == "eva"
        adapted = lora.attach(
            loaded, config.lora, upcast=config.model.upcast, checkpointing=config.train.checkpointing == "full", seed=config.run.seed,
            calibration=lora.read_documents(data.folder / "train", tokens=config.lora.calibration_tokens) if eva else None,
            original=base.folder,
        )  # fmt: skip
        quick = quicken(adapted, config.speed, placement=placement, checkpointing=config.train.checkpointing)
        facts.update(
            name=config.model.name,
            revision=base.revision,
            sha256=base.sha256,
            parameters=parameters,
            trainable_parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
            quantization=spec(config.quantization),
            bytes=size,
            speed=list(quick.choice.reasons),
        )
    return adapted, quick


def make_trainer(*arguments: Any, **inputs: Any) -> Any:
    """The trainer that will train, for the rehearsal to try; it comes late, since trl takes seconds to import."""
    from finetune.train.trainer import make_trainer as make

    return make(*arguments, **inputs)


def refuse_what_is_only_planned(config: RunConfig) -> None:
    """Says now what would otherwise fail after the data are prepared."""
    if config.launch.strategy != "single":
        raise HardwareError(
            f"launch.strategy={config.launch.strategy}: this version plans it (finetune plan) and trains in one process; "
            "choose launch=single"
        )
    if config.hardware.name != "auto":
        raise HardwareError(f"hardware={config.hardware.name} describes a machine to plan for; to run on this one, choose hardware=auto")


def set_threads(placement: Placement) -> None:
    """One process with all its threads: two processes of two threads each on two cores run ten times slower."""
    import torch

    torch.set_num_threads(placement.threads)


def write_record(folder: RunFolder, config: RunConfig, *, overrides: Sequence[str], surroundings: dict[str, Any]) -> None:
    """What was asked for and what it was run with."""
    (folder.path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder.path / "command.txt").write_text(" ".join(["python -m finetune", *overrides]) + "\n", encoding="utf-8")
    write_json(folder.path / "overrides.json", list(overrides))
    write_json(folder.path / "environment.json", surroundings)


def publish(trackers: Trackers, folder: RunFolder, files: Any) -> None:
    """Config and metrics went out as they came; now the report and the adapter."""
    trackers.artifact(files.html, name="report", kind="report")
    adapter = folder.path / "train" / "adapter"
    if adapter.is_dir():
        trackers.artifact(adapter, name="adapter", kind="model")
