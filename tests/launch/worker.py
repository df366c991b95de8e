"""One process of small trainings, one after the other.

python -m tests.launch.worker <base> <[[port, folder, settings], ...]>
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from finetune.console import log
from finetune.errors import FinetuneError, Interrupted, RankFailed
from finetune.launch import Ranks
from finetune.launch.ranks import VARIABLES
from finetune.launch.start import exit_process
from tests.fixtures.pairs import KTO
from tests.fixtures.preference_training import Collected
from tests.fixtures.preference_training import train as train_on_answers
from tests.fixtures.prompts import train_on_rewards
from tests.fixtures.trainings import Stopping, train


def seen(model: Any, *, file: Path) -> None:
    """Writes what goes through the model while it trains: a line of token ids for each document."""

    def hook(module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        if module.training:
            with open(file, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(keywords["input_ids"].flatten().tolist()) + "\n")

    model.get_base_model().model.register_forward_pre_hook(hook, with_kwargs=True)


def broken(model: Any, *, calls: int) -> None:
    """A forward pass with a non-finite loss."""
    count = 0

    def hook(module: Any, _arguments: Any, output: Any) -> None:
        nonlocal count
        count += module.training
        if module.training and count == calls:
            output.last_hidden_state.mul_(float("nan"))

    model.get_base_model().model.register_forward_hook(hook)


def scarce(model: Any, *, tokens: int) -> None:
    """A device without room for so many tokens at once."""

    def hook(module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        if module.training and keywords["input_ids"].numel() > tokens:
            raise MemoryError("no room")

    model.get_base_model().model.register_forward_pre_hook(hook, with_kwargs=True)


def main(folder: Path, base: Path, settings: dict[str, Any]) -> int:
    ranks = Ranks(shards=settings.pop("shards", False))
    rank = ranks.rank
    torch.set_num_threads(1)
    breaks, short, stop = (
        settings.pop("break_rank", None),
        settings.pop("short_rank", None),
        settings.pop("stop_step", None),
    )
    if settings.pop("stranger", None) == rank:
        settings["rank"] = 4

    if objective := settings.pop("objective", ""):
        of: dict[str, Callable[..., Any]] = {
            "grpo": train_on_rewards,
            "kto": partial(train_on_answers, trackers=Collected(), composed=KTO),
        }
        of[objective](folder, tiny_base=base, tokenizer=AutoTokenizer.from_pretrained(base), ranks=ranks, **settings)
        return 0
    models = []

    def touch(model: Any) -> None:
        models.append(model)
        seen(model, file=folder / f"seen-{rank}.jsonl")
        if breaks == rank:
            broken(model, calls=2)
        if short == rank:
            scarce(model, tokens=300)

    try:
        train(
            folder,
            tiny_base=base,
            tokenizer=AutoTokenizer.from_pretrained(base),
            ranks=ranks,
            touch=touch,
            trackers=Stopping(stop) if stop else None,
            **settings,
        )
    except Interrupted as interrupted:
        log("end", str(interrupted))
        ranks.shutdown()
        return 75
    except RankFailed as error:
        log("end", str(error))
        return error.exit_code
    except FinetuneError as error:
        log("end", str(error))
        ranks.report_failure(str(error), 2)
        return 2
    except RuntimeError as error:
        explained = ranks.final_error(error)
        if not isinstance(explained, RankFailed):
            raise
        log("end", str(explained))
        return explained.exit_code
    (folder / f"kept-{rank}.json").write_text(json.dumps(kept(models[0])))
    return 0


def kept(model: Any) -> dict[str, int]:
    """Bytes of parameters in this process: those of the layers' base, and the others."""
    found = {"base": 0, "rest": 0}
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        found["base" if ".layers." in name and not parameter.requires_grad else "rest"] += (
            local.numel() * local.element_size()
        )
    return found


if __name__ == "__main__":
    launch = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    for port, name, asked in json.loads(sys.argv[2]):
        os.environ.update(launch, MASTER_PORT=str(port))
        code = main(Path(name), Path(sys.argv[1]), asked)
        sys.stdout.write(f"ended with {code}\n")
    exit_process(code)
