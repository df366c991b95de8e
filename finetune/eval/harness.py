"""Runs tasks of EleutherAI's lm-eval on models that are in memory already; packaged tasks or the user's own files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import table
from finetune.errors import EvalError
from finetune.jsonable import to_jsonable
from finetune.scores import HarnessScores, TaskMetric, TaskScores

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "lm-eval==0.4.13"


@dataclass(kw_only=True, slots=True)
class HarnessConfig:
    """Selects the lm-eval tasks that every artifact is measured on, in addition to the held-out rows."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks or groups, e.g. ``mmlu``. Packaged tasks download their data; own files may be local."""

    include_path: str | None = None
    """Folder of the user's own task files (YAML). Data files in them are relative to the working directory."""

    limit: int | None = None
    """Number of rows of each task, from the top; None takes all."""

    shots: int | None = None
    """Number of few-shot examples; None takes the task's own number."""

    chat: bool = False
    """Whether to apply the chat template. lm-eval's published figures do not."""

    batch_rows: int = 1
    """Requests per forward pass. Memory grows with their number times the longest request times the vocabulary."""

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yields the settings that have no effect given the others, each with the reason."""
        if not self.tasks:
            names = ("include_path", "limit", "shots", "chat", "batch_rows")
            yield from ((name, "no task of lm-eval is named") for name in names)

    def problems(self) -> Iterator[str]:
        """Yields one sentence for each setting that is not allowed."""
        if self.tasks and importlib.util.find_spec("lm_eval") is None:
            yield f"eval.harness.tasks={self.tasks} needs a package that is not installed; run: pip install {PACKAGE}"
        if self.include_path is not None and not Path(self.include_path).is_dir():
            yield f"eval.harness.include_path must be a folder of task files; {self.include_path} is not one"
        minima = (("limit", self.limit, 1), ("shots", self.shots, 0), ("batch_rows", self.batch_rows, 1))
        for key, value, least in minima:
            if value is not None and value < least:
                yield f"eval.harness.{key} must be at least {least}; got {value}"


class Harness:
    """Tasks that are loaded once, before any model, and run on one model after another.

    Args:
        config: The harness group; at least one task.
        samples: Bootstrap resamples, for metrics whose standard error has no closed form.
        seed: Of the few-shot examples, of sampling and of the bootstrap.

    Raises:
        EvalError: A task is unknown, needs the hub where it cannot be reached, or cannot be loaded.
    """

    def __init__(self, config: HarnessConfig, *, samples: int, seed: int) -> None:
        self.config, self.samples, self.seed = config, samples, seed
        self.loaded = _load(config)
        for name, task in self.loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise EvalError(
                    f"eval.harness.tasks: {name} runs code that a model wrote, without limits; leave it out and "
                    "measure code with eval.metrics"
                )
            if config.shots is not None or task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=config.shots or 0)

    @property
    def key(self) -> list[Any]:
        """Identifies tasks and settings: results of the same model are reused while the key stays the same."""
        return [to_jsonable(self.config), importlib.metadata.version("lm-eval"), self.samples, self.seed]

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> HarnessScores:
        """Runs the tasks on one model.

        Args:
            model: A causal language model, with or without a peft adapter.
            tokenizer: The model's.
        """
        from lm_eval.evaluator import evaluate
        from transformers import set_seed

        from finetune.inference.logits import evaluating

        set_seed(self.seed)
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=self.seed)
        with evaluating(model):
            results = evaluate(
                lm=_wrap(model, tokenizer, batch_rows=self.config.batch_rows),
                task_dict=self.loaded,
                limit=self.config.limit,
                bootstrap_iters=self.samples,
                log_samples=False,
                apply_chat_template=self.config.chat,
                fewshot_as_multiturn=self.config.chat,
            )
        tasks = {name: _task(name, figures, results) for name, figures in results["results"].items()}
        return HarnessScores(
            lm_eval=importlib.metadata.version("lm-eval"),
            tasks={name: task for name, task in tasks.items() if task.metrics},
        )


def show_harness(harness: dict[str, HarnessScores]) -> None:
    """Prints the results of `Harness.measure`, one column per artifact with value and standard error."""
    if not harness:
        return
    first = next(iter(harness.values())).tasks
    rows = []
    for task, metric in [(task, metric) for task, results in first.items() for metric in results.metrics]:
        levels = [artifact.tasks[task].metrics[metric] for artifact in harness.values()]
        rows.append([f"{task} {metric}", *map(_level_text, levels)])
    table("eval", ["lm-eval", *harness], rows)


def _load(config: HarnessConfig) -> Any:
    """Loads tasks and their data."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from yaml import YAMLError

    names = ", ".join(config.tasks)
    offline = "; HF_HUB_OFFLINE is set, so nothing is downloaded" if os.environ.get("HF_HUB_OFFLINE") else ""
    try:
        manager = _manager(config)
        unknown = [name for name in config.tasks if name not in manager.all_tasks]
        if unknown:
            where = f"{config.include_path} and " if config.include_path else ""
            raise EvalError(
                f"eval.harness.tasks: {', '.join(unknown)} unknown; name what {where}`lm-eval ls tasks` list"
            )
        return manager.load(list(config.tasks))
    except ConnectionError as error:
        raise EvalError(
            f"eval.harness.tasks={names}: {error}{offline}; download the data beforehand, or give a task file whose "
            "data_files are local and its folder as eval.harness.include_path"
        ) from error
    except ImportError as error:
        raise EvalError(
            f"eval.harness.tasks={names}: a task needs a package that is not installed ({error}); pip install it"
        ) from error
    except StopIteration as error:
        raise EvalError(
            f"eval.harness.tasks={names}: a data file of a task is empty; lm-eval reads its first row"
        ) from error
    except (OSError, KeyError, ValueError, TypeError, AssertionError, YAMLError, TemplateError, DatasetsError) as error:
        raise EvalError(
            f"eval.harness.tasks={names} cannot be loaded: {type(error).__name__}: {error}{offline}"
        ) from error


def _manager(config: HarnessConfig) -> TaskManager:
    """Searches the user's own files first: reading the thousands of packaged tasks takes ten seconds."""
    from lm_eval.tasks import TaskManager

    if config.include_path:
        manager = TaskManager(include_path=config.include_path, include_defaults=False)
        if set(config.tasks) <= set(manager.all_subtasks):
            return manager
    return TaskManager(include_path=config.include_path)


def _wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_rows: int) -> Any:
    """Wraps the model for lm-eval without changing it.

    HFLM warns about models that it has not loaded itself, and ties their weights again. That fails on a trained
    embedding or head, or replaces the trained weights.
    """
    from lm_eval.models.huggingface import HFLM

    from finetune.inference.logits import unwrap

    core: Any = unwrap(model)
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    core.tie_weights = lambda: None
    try:
        return HFLM(pretrained=core, tokenizer=tokenizer, batch_size=batch_rows)
    finally:
        del core.tie_weights
        logger.setLevel(level)


def _task(name: str, figures: dict[str, Any], results: Any) -> TaskScores:
    """Returns the figures of a task or group; lm-eval names them ``acc,none`` and ``acc_stderr,none``."""
    metrics = {}
    better = results["higher_is_better"].get(name) or {}
    for key, value in figures.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = figures.get(f"{metric}_stderr,{filtered}")
        shown = metric if filtered == "none" else f"{metric} ({filtered})"
        stderr = float(stderr) if isinstance(stderr, int | float) else None  # lm-eval writes "N/A"
        metrics[shown] = TaskMetric(value=float(value), stderr=stderr, higher_is_better=better.get(metric))
    return TaskScores(
        rows=figures.get("sample_len"),
        shots=results["n-shot"].get(name),
        version=results["versions"].get(name),
        metrics=metrics,
    )


def _level_text(metric: TaskMetric) -> str:
    return f"{metric.value:.3f}" + (f" ± {metric.stderr:.3f}" if metric.stderr is not None else "")
