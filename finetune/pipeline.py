"""The line: the only file that knows the order of the stages."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import environment, hardware, lora, model
from finetune.config import RunConfig, to_dict, to_yaml
from finetune.console import human_bytes, log, quiet_libraries
from finetune.data import prepare
from finetune.errors import GateMissed, HardwareError
from finetune.eval import Judge, score
from finetune.export import ExportConfig, export
from finetune.export.needs import check_packages
from finetune.hardware import Machine, Placement
from finetune.inference.adapted import check_adapter, free
from finetune.kernels import apply_fusion
from finetune.launch import Ranks, log_to_file, refuse
from finetune.launch.shards import PLAIN
from finetune.merge import merge
from finetune.plan import plan, show
from finetune.preflight import UpcomingRun, run_preflight
from finetune.provenance import tell_idle, tell_unread, watch
from finetune.quantization import check_installed, choose_skip_modules, spec
from finetune.report import report
from finetune.run import STAGES, RunFolder, to_jsonable, write_json
from finetune.tracking import Trackers, figures, open_trackers
from finetune.train import assist, fit

if TYPE_CHECKING:
    from finetune.data import PreparedData
    from finetune.kernels import Fusion
    from finetune.model import Base


def run(config: RunConfig, *, overrides: Sequence[str], ranks: Ranks, again: frozenset[str] = frozenset()) -> RunFolder:
    """Takes a configuration to a run folder, up to ``run.until``.

    Args:
        config: Composed and checked.
        overrides: What the user typed, kept so that a later verb can compose the same again.
        ranks: This process, the first of its launch, and the others, which `follow`.
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
    validate_environment(config, placement)
    tell_idle(config, overrides)
    folder = RunFolder.open(config.run, again=again)
    with folder.lock():
        ranks.put("folder", str(folder.path))
        log_to_file(ranks, folder.path)
        surroundings = environment.environment(machine, placement)
        is_new = not (folder.path / "config.yaml").exists()
        if is_new:
            write_record(folder, config, overrides=overrides, surroundings=surroundings)
        log("run", f"{folder.path}: {config.model.name}, {config.quantization.method}")
        log("hardware", *placement.reasons)
        trackers = open_trackers(
            config.tracking, run_name=config.run.name, folder=folder.path, run_config=to_dict(config)
        )
        try:
            for stage in line(
                config, folder=folder, machine=machine, placement=placement, trackers=trackers, ranks=ranks
            ):
                if stage == config.run.until:
                    break
            if (
                not is_new
            ):  # only now: settings that a finished stage refuses must not replace the ones it was made with
                write_record(folder, config, overrides=overrides, surroundings=surroundings)
            files = report(folder.path, status="complete" if config.run.until == "report" else "partial")
            publish(trackers, folder, files)
        finally:
            trackers.finish()
    if is_new and config.run.until == "report":  # a run that leaves stages out leaves their settings unread
        tell_unread(config, overrides)
    missed = (folder.manifest("eval") or {"product": {"missed": []}})["product"]["missed"]
    if missed:
        raise GateMissed("; ".join(missed))
    return folder


def surroundings(config: RunConfig) -> dict[str, Any]:
    """What environment.json would say if this configuration ran here and now."""
    machine = hardware.probe(config.hardware)
    return environment.environment(machine, hardware.place(machine, config))


def line(
    config: RunConfig, *, folder: RunFolder, machine: Machine, placement: Placement, trackers: Trackers, ranks: Ranks
) -> Iterator[str]:  # fmt: skip
    """Runs the stages in order and names each one when it is done."""
    seed = config.run.seed
    with folder.measured("plan") as facts:
        planned = plan(config, machine)
        facts.update(to_jsonable(planned))
    show(planned)
    yield "plan"

    set_threads(placement, processes=ranks.local_count)
    base = model.fetch(config.model)
    tokenizer = model.load_tokenizer(base, trust_remote_code=config.model.trust_remote_code)
    log("model", model.padding(tokenizer))
    data = folder.once(prepare, config.data, tokenizer=tokenizer, seed=seed)
    yield "data"

    if config.quantization.keep_mib:
        kept = folder.once(
            choose_skip_modules, config.quantization, base=base, model=config.model, placement=placement, data=data
        )
        config = dataclasses.replace(config, quantization=kept.applied(config.quantization))
    ranks.put("data", not folder.is_done("train"))  # the others load the model, or are not needed
    base_inputs: dict[str, Any] = {
        "base": base,
        "model": config.model,
        "quantization": config.quantization,
        "placement": placement,
    }
    adapted = quick = None
    if not folder.is_done("preflight") or not folder.is_done("train"):
        with folder.measured("model") as facts:
            adapted, quick = adapt(config, base=base, data=data, placement=placement, facts=facts)
    gc.freeze()
    gc.enable()
    yield "model"

    shared: dict[str, Any] = {"data": data, "placement": placement, "seed": seed}
    graph = graph_of(config, base)
    ahead = UpcomingRun(
        train=config.train, optim=config.optim, model=config.model, quantization=config.quantization, until=config.run.until,
        make_trainer=make_trainer,
    )  # fmt: skip
    with ranks.hidden():
        rehearsal = folder.once(run_preflight, config.preflight, adapted=adapted, tokenizer=tokenizer, quick=quick, ahead=ahead, **graph, **shared
        )  # fmt: skip
    if quick and not rehearsal.quick:
        quick.switch.on = False
    yield "preflight"

    ranks.put("preflight", {"isolates": rehearsal.isolates, "quick": rehearsal.quick})
    steps: dict[str, Any] = {
        "optim": config.optim,
        "trackers": trackers,
        "packing": rehearsal.isolates,
        "quick": quick,
        "ranks": ranks,
    }
    adapter = folder.once(fit, config.train, adapted=adapted, tokenizer=tokenizer, **steps, **graph, **shared)
    del adapted, quick, steps
    free()
    ranks.shutdown()
    set_threads(placement)
    yield "train"

    merged = folder.once(merge, config.merge, adapter=adapter, data=data, seed=seed, **base_inputs)
    trackers.summary(figures("merge", merged))
    yield "merge"

    scores = folder.once(score, config.eval, adapter=adapter, merged=merged, data=data, seed=seed, **base_inputs)
    trackers.summary(figures("eval", scores))
    yield "eval"

    judge = Judge(config=config.eval, folder=scores.folder, seed=seed)
    products: dict[str, Any] = {"adapter": adapter, "merged": merged, "scores": scores, "data": data}
    folder.once(export, pushed(config.export, missed=scores.missed), judge=judge, seed=seed, **products, **base_inputs)
    yield "export"


def pushed(exports: dict[str, ExportConfig], *, missed: Sequence[str]) -> dict[str, ExportConfig]:
    """The exports as asked for, but a model that misses a threshold of ``eval.gate`` goes nowhere."""
    if not missed or not any(one.push for one in exports.values()):
        return exports
    log("export", "nothing is pushed, since a threshold of eval.gate was not met; what would go is shown")
    return {name: dataclasses.replace(one, push=False) for name, one in exports.items()}


def follow(config: RunConfig, *, ranks: Ranks) -> None:
    """What every process but the first does: waits for the data, loads the model, trains, and leaves the rest to the first."""
    quiet_libraries()
    folder = RunFolder(Path(ranks.get("folder")))
    log_to_file(ranks, folder.path)
    if not ranks.get("data"):
        ranks.shutdown()
        return
    placement = hardware.place(hardware.probe(config.hardware), config)
    set_threads(placement, processes=ranks.local_count)
    base = model.fetch(config.model)
    tokenizer = model.load_tokenizer(base, trust_remote_code=config.model.trust_remote_code)
    data = folder.product(prepare)
    if config.quantization.keep_mib:
        config = dataclasses.replace(
            config, quantization=folder.product(choose_skip_modules).applied(config.quantization)
        )
    adapted, quick = adapt(config, base=base, data=data, placement=placement, facts={})
    rehearsal = ranks.get("preflight")
    quick.switch.on = quick.switch.on and rehearsal["quick"]
    graph = graph_of(config, base)
    del graph["kernels"]
    assist(
        config=config.train, adapted=adapted, tokenizer=tokenizer, data=data, optim=config.optim, placement=placement, quick=quick,
        packing=rehearsal["isolates"], seed=config.run.seed, ranks=ranks, **graph,
    )  # fmt: skip


def graph_of(config: RunConfig, base: Base) -> dict[str, Any]:
    """What decides the numbers that a step computes, beside data and optimizer."""
    return {
        "base": base,
        "quantization": spec(config.quantization),
        "lora": config.lora,
        "upcast": config.model.upcast,
        "kernels": config.kernels,
    }


def adapt(
    config: RunConfig, *, base: Base, data: PreparedData, placement: Placement, facts: dict[str, Any]
) -> tuple[Any, Fusion]:
    """The quantized base in memory with fresh adapters on it, and how its steps are computed; ``facts`` receives what it is."""
    sharded = (
        config.launch.strategy == "fsdp"
    )  # then the base comes together in host memory, and goes to devices in parts
    home = dataclasses.replace(placement, device="cpu") if sharded else placement
    loaded = model.load(base, config.model, quantization=config.quantization, placement=home)
    parameters, size = model.parameter_count(loaded), model.resident_bytes(loaded)
    log(
        "model",
        f"{config.model.name}: {parameters:,} parameters in {human_bytes(size)} as {config.quantization.method}",
    )
    eva = config.lora.variant == "eva"
    adapted = lora.attach(
        loaded, config.lora, upcast=config.model.upcast, checkpointing=config.train.checkpointing == "full", seed=config.run.seed,
        calibration=lora.read_documents(data.folder / "train", tokens=config.lora.calibration_tokens) if eva else None,
        original=base.folder,
    )  # fmt: skip
    quick = apply_fusion(
        adapted,
        config.kernels,
        placement=placement,
        checkpointing=config.train.checkpointing,
        fusion_obstacle=PLAIN if sharded else None,
    )
    facts.update(
        name=config.model.name,
        revision=base.revision,
        sha256=base.sha256,
        parameters=parameters,
        trainable_parameters=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        quantization=spec(config.quantization),
        bytes=size,
        kernels=list(quick.choice.reasons),
    )
    return adapted, quick


def make_trainer(*arguments: Any, **inputs: Any) -> Any:
    """The trainer that will train, for the rehearsal to try; it comes late, since trl takes seconds to import."""
    from finetune.train.trainer import make_trainer as make

    return make(*arguments, ranks=Ranks({}), **inputs)  # every process that rehearses does so alone


def validate_environment(config: RunConfig, placement: Placement) -> None:
    """Says now what would otherwise fail after the data are prepared."""
    check_installed(config.quantization)
    stages = STAGES[: STAGES.index(config.run.until) + 1]
    for further in config.merge.adapters if "merge" in stages else ():
        check_adapter(Path(further).expanduser(), setting="merge.adapters")
    if "export" in stages:
        check_packages(config.export)
    refuse(config.launch, device=placement.device, rehearses=config.preflight.level != "off")
    if config.hardware.name != "auto":
        raise HardwareError(
            f"hardware={config.hardware.name} describes a machine to plan for; to run on this one, choose hardware=auto"
        )


def set_threads(placement: Placement, *, processes: int = 1) -> None:
    """The threads of a machine, dealt to its processes: two processes of two threads each on two cores run ten times slower."""
    import torch

    torch.set_num_threads(max(1, placement.threads // processes))


def write_record(
    folder: RunFolder, config: RunConfig, *, overrides: Sequence[str], surroundings: dict[str, Any]
) -> None:
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
