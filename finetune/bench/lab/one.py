"""One way of storing the base, measured in a process of its own: ``python -m finetune.bench.lab.one``."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from finetune.inference.fresh_process import answer

PREFILL_TOKENS = 256
NEW_TOKENS = 24
SHARD = "2GB"
BATCHES = (1, 8)


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Loads the base as asked and takes everything that a table needs.

    Args:
        request: ``overrides`` (the option, as a user types it), ``folder`` (the base), ``rows``, ``threads``, ``dtype``,
            ``reference`` (of the full-precision model; its file is written where ``records``), ``batch_tokens``, ``repeats`` (timed
            turns of each speed; 0 takes no speeds), ``task`` and ``humaneval`` (None where they are not asked for).

    Returns:
        See `finetune.bench.lab.compare.Measured`; ``reference`` beside them.
    """
    import torch

    from finetune import hardware
    from finetune.config import load as compose
    from finetune.hardware.backends import BACKENDS
    from finetune.inference.adapted import free
    from finetune.inference.kl_divergence import Reference, agreement, reference_logprobs
    from finetune.memory import rss_bytes
    from finetune.model import Base, ModelSpec
    from finetune.model.base import weights_sha256
    from finetune.model.load import resident_bytes

    torch.set_num_threads(request["threads"])
    config = compose(request["overrides"])
    placement = hardware.place(hardware.probe(config.hardware), config)
    placement = dataclasses.replace(placement, dtype=request["dtype"], threads=request["threads"])
    folder = Path(request["folder"])
    base = Base(folder=folder, name=str(folder), revision=None, sha256=weights_sha256(folder), source="folder")
    spec = ModelSpec(base=base, config=config.model, quantization=config.quantization, placement=placement)

    def loaded() -> tuple[Any, float]:
        started = time.perf_counter()
        model = spec.load()
        return model, round(time.perf_counter() - started, 2)

    made, make_seconds = loaded()
    size = disk_bytes(made, config.quantization)  # transformers 5.23 does not save again what it read in 4 bits
    del made
    free()
    before = rss_bytes()
    model, load_seconds = loaded()  # from the copy that making left
    weights, constants, parameters = packed(model)
    found: dict[str, Any] = {
        "make_seconds": make_seconds,
        "load_seconds": load_seconds,
        "memory_bytes": resident_bytes(model),
        "weight_bytes": weights,
        "constant_bytes": constants,
        "quantized_parameters": parameters,
        "tunable": BACKENDS[config.quantization.method].tunable,
        "load_peak_bytes": max(0, rss_bytes() - before),
        "disk_bytes": size,
        "prefill": speeds(prefill, model, request["repeats"]),
        "decode": speeds(decode, model, request["repeats"]),
    }
    rows, tokens = request["rows"], request["batch_tokens"]
    given = dict(request["reference"])
    if given.pop("records"):
        reference = reference_logprobs(model, rows, Path(given["file"]), batch_tokens=tokens)
    else:
        reference = Reference(**{**given, "file": Path(given["file"])})
    agreed = agreement(model, rows, reference, batch_tokens=tokens)
    found["losses"], found["agreement"] = (
        [[one.loss, one.tokens, one.correct] for one in agreed.losses],
        agreed.distances,
    )
    found["scores"] = task_scores(model, spec, request["task"])
    found["humaneval"] = programs(folder, request["humaneval"])
    return {**found, "reference": dataclasses.asdict(dataclasses.replace(reference, losses=()))}


def packed(model: Any) -> tuple[int, int, int]:
    """Bytes of the quantized layers' codes and of their constants, and the weights that these stand for.

    Code books (64 bytes for 4-bit) are the same for every layer and not counted. Where nothing is quantized, the layers that would be.
    """
    from torch import nn

    from finetune.quantization import quantized_layers, stored

    if not quantized_layers(model):
        head = model.get_output_embeddings()
        dense = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
        return sum(weight.nbytes for weight in dense), 0, sum(weight.numel() for weight in dense)
    codes = constants = parameters = 0
    for found in map(stored, quantized_layers(model).values()):
        codes += found.codes.nbytes
        constants += sum(tensor.nbytes for tensor in found.constants.values())
        parameters += found.shape.numel()
    return codes, constants, parameters


def disk_bytes(model: Any, quantization: Any) -> int:
    """Size of its checkpoint; where the library writes its own layers alone, with the other tensors."""
    from finetune.quantization import holdings, library_of, save

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save(model, quantization, folder, shard=SHARD)
        written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if (folder / "config.json").is_file():
            return written
    layers = [name for name, module in model.named_modules() if library_of(module)]
    return written + sum(
        tensor.nbytes for name, tensor in holdings(model) if name.rpartition(".")[0] not in layers and "[" not in name
    )


def task_scores(model: Any, spec: Any, asked: dict[str, Any] | None) -> list[float]:
    """Per held-out row of the task, how good the answer is."""
    from finetune.bench.lab.task import Task, scores
    from finetune.inference.rows import read_rows

    if asked is None:
        return []
    task = Task(**{**asked, "data": Path(asked["data"])})
    return scores(model, spec, task, read_rows(task.data / "heldout"))


def programs(folder: Path, asked: dict[str, Any] | None) -> dict[str, Any]:
    """HumanEval's pass@1, greedy."""
    from finetune.eval.completers import open_writer
    from finetune.eval.humaneval import complete, greedy, read_problems, result

    if asked is None:
        return {}
    writer = open_writer(str(folder), greedy(asked["max_new_tokens"]), quantization=asked["quantization"])
    with tempfile.TemporaryDirectory() as place:
        tasks = read_problems(Path(asked["source"]))[: asked["problems"]]
        return result(complete(tasks, writer, Path(place) / "completions.jsonl", samples=1, seed=1), seed=1)


def prefill(model: Any, batch: int) -> int:
    """One forward pass; returns its tokens."""
    import torch

    ids = some_tokens(model, batch, PREFILL_TOKENS)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return batch * PREFILL_TOKENS


def decode(model: Any, batch: int) -> int:
    """Greedy tokens after a short prompt; returns how many."""
    import torch

    ids = some_tokens(model, batch, 16)
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return batch * NEW_TOKENS


def some_tokens(model: Any, rows: int, length: int) -> Any:
    """Token ids that every vocabulary has, none of them the same as the one before. Speed does not depend on which they are."""
    import torch

    return (torch.arange(rows * length) % min(1000, model.config.vocab_size)).view(rows, length).to(model.device)


def speeds(work: Callable[[Any, int], int], model: Any, repeats: int) -> dict[str, float]:
    """Tokens a second by batch size; empty where no turn is to be timed."""
    return {str(batch): tokens_per_second(partial(work, model, batch), repeats) for batch in BATCHES} if repeats else {}


def tokens_per_second(work: Callable[[], int], repeats: int) -> float:
    """The fastest of some turns, after one that warms up."""
    work()
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        tokens = work()
        best = max(best, tokens / (time.perf_counter() - started))
    return round(best, 1)


if __name__ == "__main__":
    answer(measure)
