"""Tasks of EleutherAI's lm-eval, by its Python API, on models that are in memory already; packaged tasks or own files."""

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
from finetune.run import to_jsonable

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PACKAGE = "lm-eval==0.4.13"


@dataclass(kw_only=True, slots=True)
class HarnessConfig:
    """Which of lm-eval's tasks every artifact is measured on besides the held-out rows; none when ``tasks`` is empty."""

    tasks: list[str] = field(default_factory=list)
    """Names of tasks or groups, e.g. ``mmlu``. Packaged ones take their data from the hub; own ones may name local files."""

    include_path: str | None = None
    """Folder of own task files (YAML). Data files in them are seen from the working directory."""

    limit: int | None = None
    """Rows of each task, from the top; None takes all."""

    shots: int | None = None
    """Solved examples before each question; None takes what the task says."""

    chat: bool = False
    """Whether questions are written with the chat template. lm-eval's published figures are without."""

    batch_rows: int = 1
    """Requests per forward pass. Memory grows with it times the longest request times the vocabulary."""

    def problems(self) -> Iterator[str]:
        if self.tasks and importlib.util.find_spec("lm_eval") is None:
            yield f"eval.harness.tasks={self.tasks} needs a package that is not installed; run: pip install {PACKAGE}"
        if self.include_path is not None and not Path(self.include_path).is_dir():
            yield f"eval.harness.include_path must be a folder of task files; got {self.include_path}, which is none"
        for key, value, least in (
            ("limit", self.limit, 1),
            ("shots", self.shots, 0),
            ("batch_rows", self.batch_rows, 1),
        ):
            if value is not None and value < least:
                yield f"eval.harness.{key} must be at least {least}; got {value}"


class Harness:
    """Tasks that are loaded once, before any model is, and put to one model after another.

    Args:
        config: The harness group; at least one task.
        samples: Bootstrap resamples, for metrics whose standard error has no closed form.
        seed: Of the choice of solved examples, of sampling tasks and of the bootstrap.

    Raises:
        EvalError: A task is unknown, needs the hub where it cannot be reached, or cannot be loaded.
    """

    def __init__(self, config: HarnessConfig, *, samples: int, seed: int) -> None:
        self.config, self.samples, self.seed = config, samples, seed
        self.loaded = _load(config)
        for name, task in self.loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise EvalError(
                    f"eval.harness.tasks: {name} runs code that a model wrote, without limits; leave it out and measure code by "
                    "eval.metrics"
                )
            if config.shots is not None or task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=config.shots or 0)

    @property
    def key(self) -> list[Any]:
        """Names what is measured: while it stays the same, an earlier measurement of the same model holds."""
        return [to_jsonable(self.config), importlib.metadata.version("lm-eval"), self.samples, self.seed]

    def measure(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Puts the tasks to one model.

        Args:
            model: A causal language model, with or without a peft adapter.
            tokenizer: Its.

        Returns:
            ``{"lm_eval": version, "tasks": {task or group: {"rows", "shots", "version", "metrics":
            {metric: {"value", "stderr", "higher_is_better"}}}}}``; ``stderr`` is None where lm-eval knows none.
        """
        from lm_eval.evaluator import evaluate
        from transformers import set_seed

        from finetune.inference.logits import evaluating

        set_seed(self.seed)
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(seed=self.seed)
        with evaluating(model):
            found = evaluate(
                lm=_wrap(model, tokenizer, batch_rows=self.config.batch_rows), task_dict=self.loaded, limit=self.config.limit,
                bootstrap_iters=self.samples, log_samples=False, apply_chat_template=self.config.chat,
                fewshot_as_multiturn=self.config.chat,
            )  # fmt: skip
        tasks = {name: _task(name, figures, found) for name, figures in found["results"].items()}
        return {
            "lm_eval": importlib.metadata.version("lm-eval"),
            "tasks": {name: task for name, task in tasks.items() if task["metrics"]},
        }


def show(harness: dict[str, dict[str, Any]]) -> None:
    """Prints what `Harness.measure` found, a column per artifact: value and standard error; nothing where there is nothing."""
    if not harness:
        return
    first = next(iter(harness.values()))["tasks"]
    rows = [
        [f"{task} {metric}", *[_level(one["tasks"][task]["metrics"][metric]) for one in harness.values()]]
        for task, facts in first.items()
        for metric in facts["metrics"]
    ]
    table("eval", ["lm-eval", *harness], rows)


def _load(config: HarnessConfig) -> Any:
    """Tasks with their data, as lm-eval keeps them."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError
    from yaml import YAMLError

    asked = ", ".join(config.tasks)
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
            f"eval.harness.tasks={asked}: {error}{offline}; fetch the data beforehand, or give a task file whose data_files are local "
            "and its folder as eval.harness.include_path"
        ) from error
    except ImportError as error:
        raise EvalError(
            f"eval.harness.tasks={asked}: a task needs a package that is not installed ({error}); pip install it"
        ) from error
    except StopIteration as error:
        raise EvalError(
            f"eval.harness.tasks={asked}: a data file of a task is empty; lm-eval looks at its first row"
        ) from error
    except (OSError, KeyError, ValueError, TypeError, AssertionError, YAMLError, TemplateError, DatasetsError) as error:
        raise EvalError(
            f"eval.harness.tasks={asked} cannot be loaded: {type(error).__name__}: {error}{offline}"
        ) from error


def _manager(config: HarnessConfig) -> TaskManager:
    """Looks through the user's own files first: the packaged tasks are thousands, and reading them takes ten seconds."""
    from lm_eval.tasks import TaskManager

    if config.include_path:
        own = TaskManager(include_path=config.include_path, include_defaults=False)
        if set(config.tasks) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=config.include_path)


def _wrap(model: Any, tokenizer: Any, *, batch_rows: int) -> Any:
    """The model as lm-eval wants it, left as it is.

    HFLM warns about models that it has not loaded itself, and ties their weights again, which fails on a trained
    embedding or head, or unties it from what was trained.
    """
    from lm_eval.models.huggingface import HFLM

    from finetune.inference.logits import unwrap

    core, logger = unwrap(model), logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    core.tie_weights = lambda: None
    try:
        return HFLM(pretrained=core, tokenizer=tokenizer, batch_size=batch_rows)
    finally:
        del core.tie_weights
        logger.setLevel(level)


def _task(name: str, figures: dict[str, Any], found: Any) -> dict[str, Any]:
    """One task's or group's figures; lm-eval writes them as ``acc,none`` and ``acc_stderr,none``."""
    metrics = {}
    better = found["higher_is_better"].get(name) or {}
    for key, value in figures.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = figures.get(f"{metric}_stderr,{chosen}")
        shown = metric if chosen == "none" else f"{metric} ({chosen})"
        stderr = float(stderr) if isinstance(stderr, int | float) else None  # lm-eval says "N/A"
        metrics[shown] = {"value": float(value), "stderr": stderr, "higher_is_better": better.get(metric)}
    return {
        "rows": figures.get("sample_len"),
        "shots": found["n-shot"].get(name),
        "version": found["versions"].get(name),
        "metrics": metrics,
    }


def _level(metric: dict[str, Any]) -> str:
    return f"{metric['value']:.3f}" + (f" ± {metric['stderr']:.3f}" if metric["stderr"] is not None else "")
