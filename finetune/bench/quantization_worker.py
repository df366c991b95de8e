"""Measures one quantization backend in its own process: ``python -m finetune.bench.quantization_worker``."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.inference.fresh_process import serve_request

if TYPE_CHECKING:
    from finetune.model import ModelSpec

PREFILL_TOKENS = 256
PROMPT_TOKENS, NEW_TOKENS = 16, 24
SHARD = "2GB"
BATCHES = (1, 8)


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Loads the base as requested and measures everything that the table shows.

    Args:
        request: ``overrides`` (the option, as a user types it), ``folder`` (the base), ``rows``, ``threads``,
            ``dtype``, ``reference`` (of the full-precision model; its file is written where ``records``),
            ``batch_tokens``, ``repeats`` (timed repetitions of each speed; 0 measures none), ``task`` and ``humaneval``
            (or None).

    Returns:
        The figures of `finetune.bench.quantization.QuantizationResult`, and ``reference``.
    """
    import torch

    from finetune import hardware
    from finetune.config import load as compose
    from finetune.hardware.backends import BACKENDS
    from finetune.inference.adapted import free_memory
    from finetune.inference.kl_divergence import ReferenceLogits, compare_with_reference, record_reference
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

    def timed_load() -> tuple[Any, float]:
        started = time.perf_counter()
        model = spec.load()
        return model, round(time.perf_counter() - started, 2)

    quantized, make_seconds = timed_load()
    size = disk_bytes(quantized, config.quantization)  # transformers 5.23 does not save again what it read in 4 bits
    del quantized
    free_memory()
    before = rss_bytes()
    model, load_seconds = timed_load()  # from the cached copy
    weights, constants, parameters = packed(model)
    figures: dict[str, Any] = {
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
    reference_request = dict(request["reference"])
    if reference_request.pop("records"):
        reference = record_reference(model, rows, Path(reference_request["file"]), batch_tokens=tokens)
    else:
        reference = ReferenceLogits(**{**reference_request, "file": Path(reference_request["file"])})
    compared = compare_with_reference(model, rows, reference, batch_tokens=tokens)
    return figures | {
        "losses": [[row.loss, row.tokens, row.correct] for row in compared.losses],
        "agreement": compared.distances,
        "scores": task_scores(model, spec, request["task"]),
        "humaneval": pass_at_1(folder, request["humaneval"]),
        "reference": dataclasses.asdict(dataclasses.replace(reference, losses=())),
    }


def packed(model: Any) -> tuple[int, int, int]:
    """Returns bytes of the quantized layers' codes, bytes of their constants, and the number of weights.

    Code books (64 bytes for 4-bit) are the same for every layer and not counted. Where nothing is quantized, the layers
    that would be are counted.
    """
    from torch import nn

    from finetune.quantization import quantized_layers
    from finetune.quantization.backends import packed_weight

    if not quantized_layers(model):
        head = model.get_output_embeddings()
        dense = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
        return sum(weight.nbytes for weight in dense), 0, sum(weight.numel() for weight in dense)
    codes = constants = parameters = 0
    for weight in map(packed_weight, quantized_layers(model).values()):
        codes += weight.codes.nbytes
        constants += sum(tensor.nbytes for tensor in weight.constants.values())
        parameters += weight.shape.numel()
    return codes, constants, parameters


def disk_bytes(model: Any, quantization: Any) -> int:
    """Returns the size of its checkpoint; where the library writes its own layers alone, with the other tensors."""
    from finetune.quantization.backends import all_tensors, backend_of, save

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save(model, quantization, folder, shard=SHARD)
        written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if (folder / "config.json").is_file():
            return written
    layers = [name for name, module in model.named_modules() if backend_of(module)]
    others = [t for name, t in all_tensors(model) if name.rpartition(".")[0] not in layers and "[" not in name]
    return written + sum(tensor.nbytes for tensor in others)


def task_scores(model: Any, spec: ModelSpec, request: dict[str, Any] | None) -> list[float]:
    """Scores the answers to the task's held-out rows."""
    from finetune.bench.task import Task, scores
    from finetune.inference.rows import read_rows

    if request is None:
        return []
    task = Task(**{**request, "data": Path(request["data"])})
    return scores(model, spec, task, read_rows(task.data / "heldout"))


def pass_at_1(folder: Path, request: dict[str, Any] | None) -> dict[str, Any]:
    """Measures HumanEval's pass@1 with greedy answers."""
    from finetune.eval.completers import load_completer
    from finetune.eval.humaneval import humaneval_sampling, read_problems, run_problems, summarize

    if request is None:
        return {}
    sampling = humaneval_sampling(request["max_new_tokens"])
    completer = load_completer(str(folder), sampling, quantization=request["quantization"])
    with tempfile.TemporaryDirectory() as scratch:
        problems = read_problems(Path(request["source"]))[: request["problems"]]
        file = Path(scratch) / "completions.jsonl"
        return summarize(run_problems(problems, completer, file, samples=1, seed=1), seed=1)


def prefill(model: Any, batch: int) -> int:
    """Runs one forward pass; returns its tokens."""
    import torch

    ids = token_ids(model, batch, PREFILL_TOKENS)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return batch * PREFILL_TOKENS


def decode(model: Any, batch: int) -> int:
    """Generates greedily after a short prompt; returns the number of new tokens."""
    import torch

    ids = token_ids(model, batch, PROMPT_TOKENS)
    mask = torch.ones_like(ids)
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **length)
    return batch * NEW_TOKENS


def token_ids(model: Any, rows: int, length: int) -> Any:
    """Returns token ids that every vocabulary has, each different from the one before."""
    import torch

    return (torch.arange(rows * length) % min(1000, model.config.vocab_size)).view(rows, length).to(model.device)


def speeds(work: Callable[[Any, int], int], model: Any, repeats: int) -> dict[str, float]:
    """Returns tokens per second by batch size; empty without repetitions."""
    return {str(batch): tokens_per_second(partial(work, model, batch), repeats) for batch in BATCHES} if repeats else {}


def tokens_per_second(work: Callable[[], int], repeats: int) -> float:
    """Returns the fastest of ``repeats`` repetitions, after one that warms up."""
    work()
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        tokens = work()
        best = max(best, tokens / (time.perf_counter() - started))
    return round(best, 1)


if __name__ == "__main__":
    serve_request(measure)
