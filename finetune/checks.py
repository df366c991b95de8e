"""What every command checks before it downloads weights, opens a tracker or makes a folder.

::

    start = Start(config=config, machine=machine, placement=place(machine, config))
    log("checks", *check_before_start(start))  # what could not be checked yet
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.chat_templates import find_template, named_templates, no_template, tokenizer_template
from finetune.compatibility import check_groups, check_stored_form
from finetune.config_json import from_config_json
from finetune.data.sources import Source, resolve_sources
from finetune.errors import ConfigError, DataError, FinetuneError, HardwareError, ModelError
from finetune.export.needs import check_gguf, check_packages, check_packed
from finetune.files import existing_parent, require_disk
from finetune.hardware.cuda import check_cuda
from finetune.inference.adapted import check_adapter
from finetune.launch.start import check_launch
from finetune.model import hub
from finetune.model.base import TOKENIZER_FILES, files_here, find, is_gguf
from finetune.model.config import looks_local
from finetune.plan.phases import disk_bytes
from finetune.plan.settings import from_config
from finetune.quantization.backends import check_installed
from finetune.quantization.config import QAT
from finetune.run import STAGES
from finetune.tracking.config import check_trackers
from finetune.trust import check_weights

if TYPE_CHECKING:
    from finetune.config import RunConfig
    from finetune.hardware import Machine, Placement

RAW_FORMATS = ("text", "completion")
"""Formats whose rows are trained on as they are, without a chat template."""

FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "kernels"),
    "flash_attention_3": ("flash_attn_interface", "kernels"),
}
"""The packages that transformers takes each kernel from: one of them is enough."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is about to start.

    Attributes:
        config: The whole configuration.
        machine: The machine to run on, or to plan for.
        placement: What `place` decided for it, which has checked device, dtype and attention.
        finished: Stages of the run that are done and will not run again.
        is_plan: Nothing will run, so nothing is fetched but the config.json of a model of unknown dimensions.
    """

    config: RunConfig
    machine: Machine
    placement: Placement
    finished: frozenset[str] = frozenset()
    is_plan: bool = False

    def runs(self, stage: str) -> bool:
        """Returns whether a stage is about to run."""
        wanted = STAGES[: STAGES.index(self.config.run.until) + 1]
        return not self.is_plan and stage in wanted and stage not in self.finished

    def needs_rows(self) -> bool:
        """Returns whether the rows are read, now or by the run that is planned."""
        data = self.config.data
        return bool(data.path or data.hub or data.sources) if self.is_plan else self.runs("data")


def check_before_start(start: Start) -> list[str]:
    """Runs all checks and returns what could not be checked yet, one phrase each.

    Raises:
        FinetuneError: A check failed; a ConfigError that lists all of them where several did.
    """
    failures: dict[str, FinetuneError] = {}
    unchecked: list[str] = []
    for check in (_check_machine, _check_results, _check_data, _check_model):
        try:
            unchecked += check(start)
        except FinetuneError as error:
            failures[str(error)] = error
    if len(failures) == 1:
        raise next(iter(failures.values()))
    if failures:
        raise ConfigError(*failures)
    return [f"not checked yet: {what}" for what in dict.fromkeys(unchecked)]


def _check_machine(start: Start) -> list[str]:
    config, attention = start.config, start.placement.attention
    if start.is_plan:
        return []
    check_installed(config.quantization)
    check_launch(config.launch, device=start.placement.device, preflight=config.preflight.level != "off")
    if config.hardware.name != "auto":
        raise HardwareError(
            f"hardware={config.hardware.name} describes a machine to plan for; to run on this one, choose hardware=auto"
        )
    packages = FLASH_PACKAGES.get(attention, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise HardwareError(
            f"model.attention={attention} needs one of the packages {' and '.join(packages)}; install one, or use "
            "model.attention=sdpa"
        )
    if start.placement.device == "cuda":
        check_cuda(start.machine)
    return []


def _check_results(start: Start) -> list[str]:
    """Checks what the merge reads, and the packages of trackers and exports."""
    config = start.config
    check_merge_dtype(config, dtype=start.placement.dtype)
    check_trackers(config.tracking)
    for adapter in config.merge.adapters if start.is_plan or start.runs("merge") else ():
        check_adapter(Path(adapter).expanduser(), setting="merge.adapters")
    metrics = config.eval.metrics if start.runs("eval") and config.eval.rows else []
    rewards = config.train.grpo.rewards if start.runs("train") else {}
    if metrics or rewards:
        from finetune.eval.metrics import check_metrics  # reads data sets, which takes seconds to import

        check_metrics([*metrics, *rewards])
    if start.runs("export"):
        check_packages(config.export)
    return []


def check_merge_dtype(config: RunConfig, *, dtype: str) -> None:
    """Checks that a merge keeps the sum that ``quantization=qat`` rounds.

    Raises:
        ConfigError: It is written in another dtype than training computes in.
    """
    if config.quantization.method == QAT and config.merge.dtype != dtype:
        raise ConfigError(
            f"merge.dtype={config.merge.dtype}: quantization=qat rounds the sum of base and adapter in {dtype} here, "
            f"and an export would round another one: set merge.dtype={dtype}"
        )


def _check_data(start: Start) -> list[str]:
    """Checks every path of the data, the held-out file's included, and the access to data sets of the hub."""
    data = start.config.data
    if not start.needs_rows():
        return ["the rows, since none are named (data.path=...)"] if start.is_plan else []
    data_sets = [source for source in resolve_sources(data) if source.path is None]
    if start.is_plan:
        return [f"data.hub={source.hub}" for source in data_sets]
    return [what for source in data_sets for what in _check_data_set(source)]


def _check_data_set(source: Source) -> list[str]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = str(source.hub)
    try:
        hf_hub_download(name, "README.md", repo_type="dataset", revision=source.revision)
    except RemoteEntryNotFoundError:  # it is there and may be read, but has no README
        return []
    except GatedRepoError as error:
        raise ConfigError(
            f"data.hub={name} is gated: accept its terms at https://huggingface.co/datasets/{name}, then run "
            "`hf auth login`, or set HF_TOKEN to a token of the account that accepted them"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"data.hub={name}: the hub has no such data set, or it is private; for a private one, run `hf auth login` "
            "or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"data.revision={source.revision}: {name} has no such revision on the hub") from error
    except OSError:
        return [f"data.hub={name}, since the hub cannot be reached; it must be in the cache"]
    return []


def _check_model(start: Start) -> list[str]:
    """Checks config, tokenizer, template and weights of the base. Before a run, fetches the first two from the hub."""
    config = start.config.model
    if start.is_plan and config.architecture is not None:
        check_gguf(start.config.export, family=config.architecture.family, folder=None)
    is_local = is_gguf(config.name) or looks_local(config.name)
    folder = files_here(config)
    if not is_local and not start.is_plan:
        folder = find(config).folder
    elif not is_local and folder is None and config.architecture is None:
        folder = hub.fetch_config(config)
    if folder is None:
        why = "it is read when the file is converted" if is_gguf(config.name) else "it is not in the hub's cache"
        return [f"the tokenizer of {config.name} and its chat template: {why}", *_check_names(start, own=None)]
    check_stored_form(folder, method=start.config.quantization.method)
    _check_mixture(start.config, folder)
    check_groups(start.config.quantization, folder)
    if start.is_plan or start.runs("export"):
        check_packed(start.config.export, folder=folder)
    if looks_local(config.name) and not is_gguf(config.name):
        check_weights(folder)
    unchecked = _check_tokenizer(start, folder)
    if start.runs("export") and not config.trust_remote_code:
        check_gguf(start.config.export, family=None, folder=folder)
    return unchecked if start.is_plan else unchecked + _check_disk(start, folder, is_local=is_local)


def _check_mixture(config: RunConfig, folder: Path) -> None:
    """Checks by the base's config.json that it has the experts and routers that are to be trained."""
    try:
        architecture = from_config_json(folder)
    except ModelError:  # of a family whose dimensions are not known: checked when it is built without weights
        return
    problems = config.lora.mixture_problems(
        name=config.model.name, family=architecture.family, has_experts=architecture.experts > 0
    )
    for problem in problems:
        raise ModelError(problem)


def _check_tokenizer(start: Start, folder: Path) -> list[str]:
    name, data = start.config.model.name, start.config.data
    if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        if start.is_plan and not looks_local(name):
            what = f"the tokenizer of {name} and its chat template: it is not in the hub's cache"
            return [what, *_check_names(start, own=None)]
        raise ModelError(f"model.name: {folder} holds no tokenizer; add tokenizer.json")
    own = tokenizer_template(folder)
    _check_names(start, own=named_templates(own))
    if data.template or start.config.model.template or own or not (start.needs_rows() or start.is_plan):
        return []
    sources = resolve_sources(data) if start.needs_rows() else []
    if not sources or (start.is_plan and any(source.hub and source.format == "auto" for source in sources)):
        return ["whether the rows need a chat template, which the tokenizer does not have (data.template=...)"]
    if not all(name in RAW_FORMATS for name in _formats(sources)):
        raise no_template()
    return []


def _check_names(start: Start, *, own: dict[str, str] | None) -> list[str]:
    """Checks the names of templates; ``own`` are those of the tokenizer by name, None where it is not known yet."""
    name, fallback = start.config.data.template, start.config.model.template
    if fallback:
        find_template(fallback, setting="model.template")
    if not name or name in (own or {}):
        return []
    try:
        find_template(name)
    except DataError:
        if own is not None:
            raise
        return [f"data.template={name}: no template of that name ships, so the tokenizer must bring it"]
    return []


def _formats(sources: list[Source]) -> set[str]:
    if all(source.format != "auto" for source in sources):
        return {source.format for source in sources}
    from finetune.data.read import resolve_formats

    return {name for name, _ in resolve_formats(sources).values()}


def _check_disk(start: Start, folder: Path, *, is_local: bool) -> list[str]:
    """Checks that the disks have room for what is downloaded and for what the run writes."""
    config = start.config
    download = 0 if is_local else hub.bytes_to_download(config.model, folder)
    written, unchecked = 0.0, []
    try:
        inputs = from_config(config, start.machine)
    except ModelError as error:
        unchecked.append(f"disk space of the results: {error}")
    else:
        sizes = disk_bytes(inputs, checkpoints=config.train.keep_checkpoints)
        written += (sizes["checkpoints"] + sizes["adapter"]) * start.runs("train")
        written += sizes["merged"] * start.runs("merge")
    root = existing_parent(Path(config.run.root))
    if root.stat().st_dev == folder.stat().st_dev:
        require_disk(root, written + download, "downloading the base and writing the results", error=ConfigError)
    else:
        require_disk(root, written, "writing the results", error=ConfigError)
        require_disk(
            folder, download, "downloading the base", remedy="free some space, or set HF_HOME", error=ConfigError
        )
    return unchecked
