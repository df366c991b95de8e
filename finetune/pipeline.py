"""The pipeline: the only file that knows the order of the stages."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import environment, hardware
from finetune.checks import Start, check_before_start
from finetune.compatibility import check_compatibility
from finetune.config import RunConfig, to_dict
from finetune.console import log, quiet_libraries
from finetune.data import prepare
from finetune.errors import GateMissed
from finetune.eval import AnswerScorer, evaluate
from finetune.export import ExportConfig, export
from finetune.hardware import Machine, Placement
from finetune.hardware.place import bind_to_gpu, free_on_gpus, set_threads
from finetune.jsonable import to_jsonable
from finetune.launch import Ranks
from finetune.launch.logs import log_to_file
from finetune.merge import merge
from finetune.model import ModelFiles, ModelSpec
from finetune.model.base import find
from finetune.model.load import describe_padding, load_tokenizer
from finetune.plan import plan, require_fit, show
from finetune.plan.step import resolve_auto
from finetune.preflight import run_preflight
from finetune.preflight.trial import MakeTrainer
from finetune.products import Exports, MergedModel, PreflightResult, PreparedData, Scores, TrainedAdapter
from finetune.provenance import warn_unused_overrides
from finetune.quantized_base import with_quantized_base
from finetune.report import ReportFiles, report
from finetune.run import STAGES, RunFolder, fingerprint
from finetune.tracking import Trackers, figures, open_trackers
from finetune.train import join_training, train_adapter
from finetune.trainable import TrainableModel, TrainingJob, trainable_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every stage may ask for.

    Attributes:
        config: The whole configuration.
        folder: The run's folder.
        machine: What this machine has.
        placement: Where and how the run computes.
        trackers: Receive metrics and artifacts.
        ranks: This process, rank 0, and the others, which are in `run_worker`.
    """

    config: RunConfig
    folder: RunFolder
    machine: Machine
    placement: Placement
    trackers: Trackers
    ranks: Ranks


def run_stages(run: Run) -> Iterator[str]:
    """Runs the stages in order and yields each one's name when it is done."""
    config, folder, seed, ranks = run.config, run.folder, run.config.run.seed, run.ranks
    show_plan(run)
    yield "plan"

    files, tokenizer = find_tokenizer(run)
    data = folder.stage(
        "data",
        PreparedData,
        lambda out: prepare(config.data, folder=out, tokenizer=tokenizer, seed=seed),
        key={
            "data": config.data.key(),
            "tokenizer.sha256": files.tokenizer_sha256(),
            "model.template": config.model.template,
            "run.seed": seed,
        },
    )
    if not folder.is_done("train"):
        check_compatibility(config, files, tokenizer, data)
    yield "data"

    spec = with_quantized_base(ModelSpec.resolve(config, run.placement, files=files), folder, data, seed=seed)
    ranks.put("data", not folder.is_done("train"))  # the others load the model now, or are not needed
    training = spec.key() | {"lora": config.lora, "kernels": config.kernels, "data.sha256": data.fingerprint}
    before = folder.manifest("model") if folder.is_done("preflight") else None
    with trainable_model(config, spec, tokenizer, data, stage=folder.timed_stage("model"), before=before) as load:
        if not (folder.is_done("preflight") and folder.is_done("train")):
            load()
        yield "model"

        def job(preflight: PreflightResult | None = None) -> TrainingJob:
            return training_job(config, load(), data, preflight)

        with ranks.hidden():
            preflight = folder.stage(
                "preflight",
                PreflightResult,
                lambda out: run_preflight(
                    config.preflight, folder=out, job=job(), make_trainer=import_trainer(), until=config.run.until
                ),
                key=training | {"preflight": config.preflight, "run.seed": seed},
            )
        yield "preflight"

        ranks.put("preflight", "done")
        adapter = folder.stage(
            "train",
            TrainedAdapter,
            lambda out: train_adapter(job(preflight), folder=out, trackers=run.trackers, ranks=ranks),
            key=training | {"train": config.train.key(), "optim": config.optim, "run.seed": seed},
        )
    ranks.shutdown()
    set_threads(run.placement)
    yield "train"

    trained = spec.key() | {"data.sha256": data.fingerprint, "adapter.sha256": adapter.adapter_sha256, "run.seed": seed}
    merged = folder.stage(
        "merge",
        MergedModel,
        lambda out: merge(config.merge, folder=out, spec=spec, adapter=adapter, data=data, seed=seed),
        key=trained | {"merge": config.merge},
    )
    run.trackers.summary(figures("merge", merged))
    yield "merge"

    scores = folder.stage(
        "eval",
        Scores,
        lambda out: evaluate(config.eval, folder=out, spec=spec, adapter=adapter, merged=merged, data=data, seed=seed),
        key=trained | {"merged.sha256": merged.sha256, "eval": config.eval},
    )
    run.trackers.summary(figures("eval", scores))
    yield "eval"

    exports = without_push_if_gated(config.export, missed=scores.missed)
    scorer = AnswerScorer(config=config.eval, folder=scores.folder, seed=seed)
    folder.stage(
        "export",
        Exports,
        lambda out: export(
            exports, folder=out, spec=spec, adapter=adapter, merged=merged, scores=scores, data=data, scorer=scorer
        ),
        key=trained | {"merged.sha256": merged.sha256, "scores.sha256": fingerprint(scores), "export": exports},
    )
    yield "export"


def run(config: RunConfig, *, overrides: Sequence[str], ranks: Ranks, redo: frozenset[str] = frozenset()) -> RunFolder:
    """Takes a configuration to a run folder, up to ``run.until``.

    Args:
        config: Composed and checked.
        overrides: What the user typed, kept so that a later command composes the same again.
        ranks: This process, rank 0 of its launch, and the others, which are in `run_worker`.
        redo: Stages to run again although they are done.

    Raises:
        FinetuneError: The user can fix it.
        Interrupted: A signal came; everything was saved.
        GateMissed: A threshold of ``eval.gate`` was not met; the report is written.
    """
    quiet_libraries()
    machine = hardware.probe(config.hardware)
    placement = hardware.place(machine, config)
    bind_to_gpu(machine, placement, local=ranks.local)
    finished = RunFolder.finished(config.run, redo=redo)
    start = Start(config=config, machine=machine, placement=placement, finished=finished)
    log("checks", *check_before_start(start))
    warn_unused_overrides(config, overrides)
    folder = RunFolder.open(config.run, redo=redo)
    with folder.lock():
        ranks.put("folder", str(folder.path))
        config = resolve_auto(config, machine, run=folder.path)
        log_to_file(ranks, folder.path)
        gc.disable()  # until the model is loaded, see `trainable.load_trainable_model`
        described = environment.describe(machine, placement)
        is_new = not (folder.path / "config.yaml").exists()
        if is_new:
            environment.write_record(folder.path, config, overrides=overrides, described=described)
        log("run", f"{folder.path}: {config.model.name}, {config.quantization.method}")
        log("hardware", *placement.reasons)
        trackers = open_trackers(
            config.tracking, run_name=config.run.name, folder=folder.path, run_config=to_dict(config)
        )
        try:
            run_context = Run(
                config=config, folder=folder, machine=machine, placement=placement, trackers=trackers, ranks=ranks
            )
            for stage in run_stages(run_context):
                if stage == config.run.until:
                    break
            if not is_new:  # only now: settings that a finished stage refuses must not replace those it was made with
                environment.write_record(folder.path, config, overrides=overrides, described=described)
            files = report(folder.path, status="complete" if config.run.until == "report" else "partial")
            log_artifacts(trackers, folder, files)
        finally:
            trackers.finish()
    missed = (folder.manifest("eval") or {"product": {"missed": []}})["product"]["missed"]
    if missed:
        raise GateMissed("; ".join(missed))
    return folder


def run_worker(config: RunConfig, *, ranks: Ranks) -> None:
    """Runs every process but rank 0: waits for the data, loads the model, trains, and leaves the rest to rank 0."""
    quiet_libraries()
    folder = RunFolder(Path(ranks.get("folder")))
    log_to_file(ranks, folder.path)
    if not ranks.get("data"):
        ranks.shutdown()
        return
    machine = hardware.probe(config.hardware)
    config = resolve_auto(config, machine, run=folder.path)  # as process 0 has recorded it
    placement = hardware.place(machine, config)
    bind_to_gpu(machine, placement, local=ranks.local)
    set_threads(placement, processes=ranks.local_count)
    data = folder.product("data", PreparedData)
    spec = with_quantized_base(ModelSpec.resolve(config, placement), folder, data, seed=config.run.seed)
    with trainable_model(config, spec, spec.load_tokenizer(), data, stage=nullcontext({})) as load:
        trainable = load()
        ranks.get("preflight")
        preflight = folder.product("preflight", PreflightResult)
        join_training(training_job(config, trainable, data, preflight), ranks=ranks)


def show_plan(run: Run) -> None:
    """Computes, prints and records what the run will take; refuses what cannot fit."""
    with run.folder.timed_stage("plan") as facts:
        planned = plan(run.config, run.machine)
        facts.update(to_jsonable(planned))
    show(planned)
    trains = STAGES.index(run.config.run.until) >= STAGES.index("train") and not run.folder.is_done("train")
    free = free_on_gpus(run.machine, run.config, run.placement)
    require_fit(planned, unless=not trains or run.config.preflight.level == "off", free=free)


def find_tokenizer(run: Run) -> tuple[ModelFiles, PreTrainedTokenizerBase]:
    """Sets the number of threads, finds config and tokenizer, all that the data need, and loads the tokenizer."""
    set_threads(run.placement, processes=run.ranks.local_count)
    files = find(run.config.model)
    model = run.config.model
    tokenizer = load_tokenizer(files, trust_remote_code=model.trust_remote_code, template=model.template)
    log("model", describe_padding(tokenizer))
    return files, tokenizer


def training_job(
    config: RunConfig, trainable: TrainableModel, data: PreparedData, preflight: PreflightResult | None = None
) -> TrainingJob:
    """Returns what is trained, in the way that the preflight found to be exact."""
    if preflight is not None:
        trainable.apply(preflight)
    return TrainingJob(config=config.train, optim=config.optim, trainable=trainable, data=data, seed=config.run.seed)


def import_trainer() -> MakeTrainer:
    """Imports the function that makes the trainer; late, since importing trl takes seconds."""
    from finetune.train.trainer import make_trainer

    return make_trainer


def without_push_if_gated(exports: dict[str, ExportConfig], *, missed: Sequence[str]) -> dict[str, ExportConfig]:
    """Returns the exports as asked for, but pushes nothing where a threshold of ``eval.gate`` was missed."""
    if not missed or not any(export.push for export in exports.values()):
        return exports
    log("export", "nothing is pushed, since a threshold of eval.gate was not met; what would be pushed is shown")
    return {name: dataclasses.replace(export, push=False) for name, export in exports.items()}


def log_artifacts(trackers: Trackers, folder: RunFolder, files: ReportFiles) -> None:
    """Sends the report and the adapter to the trackers; config and metrics are there already."""
    trackers.artifact(files.html, name="report", kind="report")
    adapter = folder.path / "train" / "adapter"
    if adapter.is_dir():
        trackers.artifact(adapter, name="adapter", kind="model")
