"""Writes one merge candidate to disk: base weights plus the changes of the adapter, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from finetune.errors import MergeError
from finetune.inference.chat import Chat, save_tokenizer
from finetune.merge.adapter_deltas import Change, EmbeddingRows, LowRank, ReplacedTensor
from finetune.merge.checkpoint import (
    INDEX,
    PIECE_BYTES,
    ShardWriter,
    StoredTensor,
    TensorHeader,
    write_index,
)
from finetune.merge.config_file import write_config
from finetune.merge.experts import (
    ExpertStack,
    ExpertUpdates,
    is_expert_change,
    rename_expert_changes,
    router_name,
)
from finetune.merge.prequantized import dense_checkpoint
from finetune.model.text_only import config_of_text, decoder_name

if TYPE_CHECKING:
    from finetune.quantization.stored import StoredLayers

Source = Callable[[str], Tensor | ExpertStack | None]
"""Returns the weight to start from for a tensor's name; None where it is the one on disk."""

TensorChange = Change | ExpertUpdates

MAX_PARALLEL_FILES = 4
"""Each needs memory for some pieces of 4 MiB, and for a dense layer where weights are dequantized."""

NOT_COPIED = {
    *(INDEX, "config.json", "quantize_config.json", "quant_config.json"),
    *("adapter_config.json", "training_args.bin", "trainer_state.json"),
}
COPIED = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the candidate: its name, the base's tensor, and the adapter's change of it."""

    name: str
    stored: StoredTensor
    change: TensorChange | None

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.change, ReplacedTensor):
            return tuple(self.change.value.shape)
        return tuple(self.change.shape) if isinstance(self.change, LowRank) else self.stored.shape


@dataclass(frozen=True, slots=True)
class MergeCandidate:
    """A candidate on disk.

    Attributes:
        folder: A plain transformers folder.
        bytes: Size of its weights.
        adapted: Number of weights in tensors that the adapter changes.
        changed: Number of those that differ from the base after rounding to the written dtype.
    """

    folder: Path
    bytes: int
    adapted: int
    changed: int


def from_disk(name: str) -> None:
    """Returns None for every tensor: the source of the ``original`` candidate, whose weights are those on disk."""


def build(
    base: Path,
    changes: dict[str, Change],
    target: Path,
    *,
    dtype: torch.dtype,
    source: Source = from_disk,
    packed: StoredLayers | None = None,
) -> MergeCandidate:
    """Writes base plus changes as a plain transformers folder, in about 200 MB of memory plus one dequantized layer.

    Args:
        base: Its file names and tensor names are used again.
        changes: By tensor name, from `read_changes`.
        target: Folder to create; must not exist.
        dtype: Of the floating-point tensors.
        source: Returns the weights to start from.
        packed: The layers that the base's own files hold quantized, all of which ``source`` gives.

    Raises:
        MergeError: The base is quantized and ``packed`` was not given; or it lacks a tensor that the adapter
            changes, or has it in another shape.
    """
    config = json.loads((base / "config.json").read_text())
    if config.get("quantization_config") and packed is None:
        raise MergeError(
            f"{base} is quantized on disk, so its weights cannot be changed; give the full-precision base as model.name"
        )
    checkpoint = dense_checkpoint(base, packed, dtype=dtype)
    files, untied = _plan(checkpoint, changes, base=base, config=config)
    target.mkdir(parents=True)
    headers = {
        name: [TensorHeader(plan.name, _written_dtype(plan.stored, dtype), plan.shape) for plan in plans]
        for name, plans in files.items()
    }

    def write(name: str) -> list[tuple[int, int]]:
        with ShardWriter(target / name, headers[name]) as writer:
            return [_write(plan, writer, dtype=dtype, source=source) for plan in files[name]]

    with _thread_per_file() as pool:
        counts = [count for file_counts in pool.map(write, files) for count in file_counts]
    write_index(target, headers)
    write_config(config, target / "config.json", dtype=dtype, files=files, untied=untied)
    for file in base.iterdir():
        if file.suffix in COPIED and file.name not in NOT_COPIED:
            shutil.copyfile(file, target / file.name)
    adapted, changed = sum(count for count, _ in counts), sum(count for _, count in counts)
    size = sum(tensor.size for tensors in headers.values() for tensor in tensors)
    return MergeCandidate(folder=target, bytes=size, adapted=adapted, changed=changed)


@contextmanager
def _thread_per_file() -> Iterator[ThreadPoolExecutor]:
    """Yields threads that each write one file with one torch thread: a piece is too small for torch to divide.

    Measured on 2 cores, next to another busy process: 6.2 GB of bfloat16 take 60 s with torch's two threads on one
    file, and 15 s with one thread on each of two files.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(
            min(threads, MAX_PARALLEL_FILES), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _written_dtype(stored: StoredTensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if stored.dtype.is_floating_point else stored.dtype


def _write(plan: TensorPlan, writer: ShardWriter, *, dtype: torch.dtype, source: Source) -> tuple[int, int]:
    """Writes one tensor; returns how many of its weights the adapter adapts, and how many differ from the base's."""
    change, dtype = plan.change, _written_dtype(plan.stored, dtype)
    if isinstance(change, ReplacedTensor):
        writer.write(change.value.to(dtype))
        return change.value.numel(), change.value.numel()
    start = change.start if isinstance(change, LowRank) and change.start is not None else source(plan.name)
    if tuple(plan.stored.shape if start is None else start.shape) != plan.shape:
        raise MergeError(
            f"{plan.name}: the adapter is for {plan.shape} weights and the base has {plan.stored.shape}: another base; "
            "give the base that the adapter was trained on"
        )
    adapted = changed = 0
    for first, old in _split(start) if isinstance(start, Tensor) else (start or plan.stored).pieces():
        if change is None:
            writer.write(old.to(dtype))
            continue
        new = _changed(change, first, old, dtype=dtype)
        writer.write(new)
        adapted += new.numel()
        changed += _count_different(new, old.to(dtype))
    return adapted, changed


def _count_different(new: Tensor, old: Tensor) -> int:
    """Counts the elements whose bits differ, in a third of the time that comparing bfloat16 takes."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[new.dtype.itemsize]
    return int(np.count_nonzero(new.view(bits).numpy() != old.view(bits).numpy()))


def _split(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, PIECE_BYTES // (4 * max(weight[0].numel(), 1)))
    for first in range(0, len(weight), step):
        yield first, weight[first : first + step].cpu()


def _changed(change: TensorChange, first: int, old: Tensor, *, dtype: torch.dtype) -> Tensor:
    if isinstance(change, LowRank | ExpertUpdates):
        return change.apply(first, old.to(torch.float32, copy=True)).to(dtype)
    assert isinstance(change, EmbeddingRows)
    new = old.to(dtype, copy=True)
    inside = (change.indices >= first) & (change.indices < first + len(old))
    new[change.indices[inside] - first] = change.values[inside].to(dtype)
    return new


def _plan(
    checkpoint: dict[str, list[tuple[str, StoredTensor]]],
    changes: dict[str, Change],
    *,
    base: Path,
    config: dict[str, Any],
) -> tuple[dict[str, list[TensorPlan]], bool]:
    """Returns the tensors by file, and whether embedding and head are no longer tied: only one of them was trained."""
    stored = {name: entry for tensors in checkpoint.values() for name, entry in tensors}
    tied = bool(config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False)))
    embedding, head = tied_names(base) if tied else ("", "")
    of_experts = {name: change for name, change in changes.items() if is_expert_change(name)}
    shapes = {name: entry.shape for name, entry in stored.items()}
    resolved: dict[str, TensorChange] = rename_expert_changes(of_experts, shapes, base=base)
    head_change: Change | None = None
    for name, change in changes.items():
        if name in of_experts:
            continue
        if name == head and _resolve(head, stored) is None:
            head_change = change
            continue
        stored_name = _resolve(name, stored) or router_name(name, stored)
        if stored_name is None:
            raise MergeError(
                f"the adapter changes {name}, which {base} does not have; give the base that it was trained on"
            )
        resolved[stored_name] = change
    stored_embedding = (_resolve(embedding, stored) if tied else None) or ""
    embedding_change = resolved.get(stored_embedding)
    untied = (
        tied
        and (head_change is not None or isinstance(embedding_change, LowRank | ReplacedTensor))
        and not _same(head_change, embedding_change)
    )
    files = {
        file: [TensorPlan(name, entry, resolved.get(name)) for name, entry in tensors]
        for file, tensors in checkpoint.items()
    }
    if untied and head not in stored:
        if head_change is None and isinstance(embedding_change, LowRank) and embedding_change.start is not None:
            head_change = ReplacedTensor(embedding_change.start)  # an embedding that grew: the head grew with it
        files[list(files)[-1]].append(TensorPlan(head, stored[stored_embedding], head_change))
    return files, untied


def _same(first: TensorChange | None, second: TensorChange | None) -> bool:
    if not isinstance(first, ReplacedTensor) or not isinstance(second, ReplacedTensor):
        return False
    return torch.equal(first.value, second.value)


def _resolve(name: str, stored: dict[str, StoredTensor]) -> str | None:
    """Returns the checkpoint's name of a module's tensor: the same, that of an image-text model's decoder, or the only
    one that differs by a leading part."""
    if name in stored:
        return name
    decoder = [other for other in stored if decoder_name(other) == name]
    similar = decoder or [other for other in stored if name.endswith("." + other) or other.endswith("." + name)]
    return similar[0] if len(similar) == 1 else None


def tied_names(base: Path) -> tuple[str, str]:
    """Returns the names of the embedding's and the head's weight in the model's class, found on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of_text(base) or AutoConfig.from_pretrained(base))
    names = {id(module): name for name, module in model.named_modules()}
    return f"{names[id(model.get_input_embeddings())]}.weight", f"{names[id(model.get_output_embeddings())]}.weight"


def write_chat(folder: Path, chat: Chat) -> None:
    """Saves the tokenizer of the data next to the weights, and every end token in the generation config.

    A base whose end token is not its template's end of turn would otherwise continue after its answer.
    """
    save_tokenizer(chat.tokenizer, folder)
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings["eos_token_id"] = chat.ends[0] if len(chat.ends) == 1 else chat.ends
    settings["pad_token_id"] = chat.tokenizer.pad_token_id
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
