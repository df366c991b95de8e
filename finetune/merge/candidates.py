"""Builds one merge candidate on disk: base weights plus what the adapter changes, tensor by tensor."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.errors import MergeError
from finetune.inference.chat import Chat
from finetune.merge.adapter_deltas import Change, LowRank, Rows, Whole
from finetune.merge.checkpoint import INDEX, PIECE_BYTES, Planned, ShardWriter, Stored, read_checkpoint, write_index

Source = Callable[[str], Tensor | None]
"""The weight to start from for a tensor's name, where it is not the one on disk; None where it is."""

FILES = 4
"""Written at a time at most. Each holds some pieces of 4 MiB, and a dense layer where weights are dequantized."""

LEFT_BEHIND = {INDEX, "config.json", "adapter_config.json", "training_args.bin", "trainer_state.json"}
COPIED = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the candidate: its name there, where it comes from, what happens to it."""

    name: str
    stored: Stored
    change: Change | None

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.change, Whole):
            return tuple(self.change.value.shape)
        return tuple(self.change.shape) if isinstance(self.change, LowRank) else self.stored.shape


@dataclass(frozen=True, slots=True)
class Built:
    """A candidate on disk.

    Attributes:
        folder: A plain transformers folder.
        bytes: Size of its weights.
        adapted: Weights in tensors that the adapter touches.
        changed: Those of them that differ from the base after rounding to the written numbers.
    """

    folder: Path
    bytes: int
    adapted: int
    changed: int


def from_disk(name: str) -> None:
    """The source of the ``original`` candidate: every weight as it was downloaded."""


def build(
    base: Path, changes: dict[str, Change], target: Path, *, dtype: torch.dtype, source: Source = from_disk
) -> Built:
    """Writes base plus changes as a plain transformers folder, in about 200 MB of memory beside one dequantized layer.

    Args:
        base: The dense base; its file names and tensor names are kept.
        changes: By tensor name, from `read_changes`.
        target: Made; must not exist.
        dtype: Numbers of the floating tensors.
        source: Where a weight starts from, if not from disk.

    Raises:
        MergeError: The adapter names a tensor that the base does not have, or one of another shape.
    """
    config = json.loads((base / "config.json").read_text())
    if config.get("quantization_config"):
        raise MergeError(
            f"{base} is quantized on disk, so its weights cannot be added to; give the full-precision base as model.name"
        )
    files, untied = _plan(read_checkpoint(base), changes, base=base, config=config)
    target.mkdir(parents=True)
    planned = {
        name: [Planned(piece.name, _numbers(piece.stored, dtype), piece.shape) for piece in pieces]
        for name, pieces in files.items()
    }

    def write(name: str) -> tuple[int, int]:
        with ShardWriter(target / name, planned[name]) as writer:
            counts = [
                _write(piece, writer, dtype=_numbers(piece.stored, dtype), source=source) for piece in files[name]
            ]
        return sum(adapted for adapted, _ in counts), sum(changed for _, changed in counts)

    with _files_at_a_time() as pool:
        counts = list(pool.map(write, files))
    write_index(target, planned)
    _write_config(config, target / "config.json", dtype=dtype, files=files, untied=untied)
    for file in base.iterdir():
        if file.suffix in COPIED and file.name not in LEFT_BEHIND:
            shutil.copyfile(file, target / file.name)
    size = sum(tensor.size for tensors in planned.values() for tensor in tensors)
    return Built(
        folder=target,
        bytes=size,
        adapted=sum(adapted for adapted, _ in counts),
        changed=sum(changed for _, changed in counts),
    )


@contextmanager
def _files_at_a_time() -> Iterator[ThreadPoolExecutor]:
    """Threads that each write a file. A piece is too small for torch to share, so each computes alone.

    Measured on 2 cores beside another busy process: 6.2 GB of bfloat16 in 60 s with torch's two threads on one file, in 15 s with one
    on each of two files.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, FILES), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _numbers(stored: Stored, dtype: torch.dtype) -> torch.dtype:
    return dtype if stored.dtype.is_floating_point else stored.dtype


def _write(piece: Piece, writer: ShardWriter, *, dtype: torch.dtype, source: Source) -> tuple[int, int]:
    """Writes one tensor; returns how many weights the adapter touches in it, and how many came out different."""
    change = piece.change
    if isinstance(change, Whole):
        writer.write(change.value.to(dtype))
        return change.value.numel(), change.value.numel()
    own = change.start if isinstance(change, LowRank) and change.start is not None else source(piece.name)
    if tuple(piece.stored.shape if own is None else own.shape) != piece.shape:
        raise MergeError(
            f"{piece.name}: the adapter is for {piece.shape} weights and the base has {piece.stored.shape}: another base"
        )
    adapted = changed = 0
    for first, old in piece.stored.pieces() if own is None else _split(own):
        if change is None:
            writer.write(old.to(dtype))
            continue
        new = _changed(change, first, old, dtype=dtype)
        writer.write(new)
        adapted += new.numel()
        changed += _differing(new, old.to(dtype))
    return adapted, changed


def _differing(new: Tensor, old: Tensor) -> int:
    """How many numbers differ, by their bits: a third of the time that comparing bfloat16 takes."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[new.dtype.itemsize]
    return int(np.count_nonzero(new.view(bits).numpy() != old.view(bits).numpy()))


def _split(weight: Tensor) -> Any:
    step = max(1, PIECE_BYTES // (4 * max(weight[0].numel(), 1)))
    for first in range(0, len(weight), step):
        yield first, weight[first : first + step].cpu()


def _changed(change: Change, first: int, old: Tensor, *, dtype: torch.dtype) -> Tensor:
    if isinstance(change, LowRank):
        return change.apply(first, old.to(torch.float32, copy=True)).to(dtype)
    assert isinstance(change, Rows)
    new = old.to(dtype, copy=True)
    here = (change.indices >= first) & (change.indices < first + len(old))
    new[change.indices[here] - first] = change.values[here].to(dtype)
    return new


def _plan(
    checkpoint: dict[str, list[tuple[str, Stored]]], changes: dict[str, Change], *, base: Path, config: dict[str, Any]
) -> tuple[dict[str, list[Piece]], bool]:
    """Pieces by file, and whether embedding and head part ways because only one of them was trained."""
    stored = {name: entry for tensors in checkpoint.values() for name, entry in tensors}
    tied = bool(config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False)))
    embedding, head = tied_names(base) if tied else ("", "")
    resolved: dict[str, Change] = {}
    apart: Change | None = None
    for name, change in changes.items():
        if name == head and _resolve(head, stored) is None:
            apart = change
            continue
        found = _resolve(name, stored)
        if found is None:
            raise MergeError(
                f"the adapter changes {name}, which {base} does not have; give the base that it was trained on"
            )
        resolved[found] = change
    trunk = _resolve(embedding, stored) if tied else None
    untied = (
        tied
        and (apart is not None or isinstance(resolved.get(trunk or ""), LowRank | Whole))
        and not _same(apart, resolved.get(trunk or ""))
    )
    files = {
        file: [Piece(name, entry, resolved.get(name)) for name, entry in tensors]
        for file, tensors in checkpoint.items()
    }
    if untied and head not in stored:
        last = list(files)[-1]
        grown = resolved.get(trunk or "")
        alone = (
            Whole(grown.start) if apart is None and isinstance(grown, LowRank) and grown.start is not None else apart
        )
        files[last] = [*files[last], Piece(head, stored[trunk or ""], alone)]
    return files, untied


def _same(one: Change | None, other: Change | None) -> bool:
    return isinstance(one, Whole) and isinstance(other, Whole) and torch.equal(one.value, other.value)


def _resolve(name: str, stored: dict[str, Stored]) -> str | None:
    """The checkpoint's name of a module's tensor: the same, or the only one that differs by a leading part."""
    if name in stored:
        return name
    near = [other for other in stored if name.endswith("." + other) or other.endswith("." + name)]
    return near[0] if len(near) == 1 else None


def tied_names(base: Path) -> tuple[str, str]:
    """Names of the embedding's and the head's weight in the model's class, found on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    names = {id(module): name for name, module in model.named_modules()}
    return f"{names[id(model.get_input_embeddings())]}.weight", f"{names[id(model.get_output_embeddings())]}.weight"


def write_chat(folder: Path, chat: Chat) -> None:
    """Puts the tokenizer of the data beside the weights, and every end token into the generation config.

    A base whose end token is not its template's end of turn would otherwise talk on after its answer.
    """
    chat.tokenizer.save_pretrained(folder)
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings["eos_token_id"] = chat.ends[0] if len(chat.ends) == 1 else chat.ends
    settings["pad_token_id"] = chat.tokenizer.pad_token_id
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write_config(
    config: dict[str, Any], file: Path, *, dtype: torch.dtype, files: dict[str, list[Piece]], untied: bool
) -> None:
    written = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    written["dtype"] = str(dtype).removeprefix("torch.")
    if untied:
        written["tie_word_embeddings"] = False
    for piece in (piece for pieces in files.values() for piece in pieces):
        if piece.shape[:1] != piece.stored.shape[:1] and piece.stored.shape[:1] == (config.get("vocab_size"),):
            written["vocab_size"] = piece.shape[0]
    file.write_text(json.dumps(written, indent=2) + "\n")
