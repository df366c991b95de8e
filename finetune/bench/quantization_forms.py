"""Gives a base the form of one method and loads it: what differs between the methods of `quantization_worker`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.bench.quantization_bytes import layer_bytes, matmul_bytes, saved_bytes
from finetune.bench.quantization_methods import FP8, GGUF, ONNX, W8A8
from finetune.bench.quantization_runners import LlamaCppRunner, Runner, TransformersRunner
from finetune.hardware.backends import BACKENDS, CALIBRATED

if TYPE_CHECKING:
    from finetune.model import ModelSpec
    from finetune.products import PreparedData

SEED = 1
"""Of the calibration rows' order."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A model in the form that a method gives it.

    Attributes:
        runner: The loaded model.
        make_seconds: To make the form from the base in 16 bits, and to write it.
        load_seconds: To load it again; None where it is made at each start.
        code_bytes, constant_bytes: Of the quantized layers; blocks that hold both count as codes.
        weights: Weights in those layers.
        memory_bytes, disk_bytes: Of all tensors; of the files, None where there are none.
        tunable: Whether an adapter can be trained on it.
    """

    runner: Runner
    make_seconds: float
    load_seconds: float | None
    code_bytes: int
    constant_bytes: int
    weights: int
    memory_bytes: int
    disk_bytes: int | None
    tunable: bool


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where forms are made.

    Attributes:
        work: Folder that all methods of one comparison share.
        data: Prepared rows, to calibrate on; None where the method needs none.
        context: Tokens of the longest row that will be measured.
    """

    work: Path
    data: PreparedData | None
    context: int


def make_form(method: str, spec: ModelSpec, place: Workplace) -> Form:
    """Gives the base a method's form.

    Args:
        method: One of `finetune.bench.quantization_methods`.
        spec: The dense base with the method's option of the quantization group.
        place: Where to write.

    Raises:
        FinetuneError: The method cannot make it of this base, or on this machine.
    """
    if method in GGUF:
        return _gguf(method, spec, place)
    if method in ONNX:
        return _onnx(method, spec, place)
    if method in W8A8:
        return _int8_layers(method, spec, place)
    if method == FP8 or method in CALIBRATED:
        return _packed(method, spec, place)
    return _loaded(spec)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Returns what ``work`` returns, and its seconds."""
    started = time.perf_counter()
    result = work()
    return result, round(time.perf_counter() - started, 2)


def _loaded(spec: ModelSpec) -> Form:
    """Makes a form by loading: the first load writes a cached copy, the second one reads it."""
    from finetune.inference.adapted import free_memory

    model, make_seconds = timed(spec.load)
    size = saved_bytes(model, spec.quantization)  # transformers 5.23 does not save again what it read in 4 bits
    del model
    free_memory()
    model, load_seconds = timed(spec.load)
    return _torch_form(model, spec, make_seconds=make_seconds, load_seconds=load_seconds, disk_bytes=size)


def _packed(method: str, spec: ModelSpec, place: Workplace) -> Form:
    """Makes a checkpoint that is stored quantized."""
    packed, make_seconds = timed(lambda: _fp8(spec, place) if method == FP8 else _calibrated(method, spec, place))
    model, load_seconds = timed(packed.load)
    size = sum(file.stat().st_size for file in packed.base.folder.glob("*.safetensors"))
    return _torch_form(model, packed, make_seconds=make_seconds, load_seconds=load_seconds, disk_bytes=size)


def _calibrated(method: str, spec: ModelSpec, place: Workplace) -> ModelSpec:
    from finetune.quantization.rounded import round_base

    assert place.data is not None
    folder = place.work / method
    folder.mkdir(exist_ok=True)
    return round_base(spec, folder=folder, data=place.data, seed=SEED).apply_to(spec)


def _fp8(spec: ModelSpec, place: Workplace) -> ModelSpec:
    from finetune.export.fp8 import round_checkpoint
    from finetune.export.packed import linear_layers
    from finetune.quantization.config import PREQUANTIZED, QuantizationConfig

    target = place.work / FP8
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(spec.base.folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    round_checkpoint(spec.base.folder, target, linear_layers(spec.config, spec.base.folder, name=FP8), name=FP8)
    base = dataclasses.replace(spec.base, folder=target, name=str(target))
    return dataclasses.replace(spec, base=base, quantization=QuantizationConfig(method=PREQUANTIZED))


def _int8_layers(method: str, spec: ModelSpec, place: Workplace) -> Form:
    """Replaces layers in memory; there is no file in this form."""
    from finetune.bench.int8_layers import replace_layers
    from finetune.errors import ModelError
    from finetune.quantization.calibration import calibration_sequences

    sequences: list[list[int]] = []
    if place.data is not None:
        settings = spec.quantization
        rows, tokens = settings.calibration_rows, settings.calibration_tokens
        calibration = calibration_sequences(place.data.folder / "train", rows=rows, tokens=tokens, seed=SEED)
        if calibration.shortage:
            raise ModelError(f"{method}: {calibration.shortage}")
        sequences = calibration.sequences
    started = time.perf_counter()
    model: Any = spec.load()
    layers = replace_layers(model, method, sequences)
    seconds = round(time.perf_counter() - started, 2)
    return Form(
        runner=TransformersRunner(model, spec.load_tokenizer()),
        make_seconds=seconds,
        load_seconds=None,
        code_bytes=sum(layer.codes.nbytes for layer in layers),
        constant_bytes=sum(layer.constants() for layer in layers),
        weights=sum(layer.codes.numel() for layer in layers),
        memory_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        disk_bytes=None,
        tunable=False,
    )


def _gguf(method: str, spec: ModelSpec, place: Workplace) -> Form:
    """Writes a GGUF file and opens it in llama.cpp."""
    from gguf import GGUFReader
    from transformers import AutoConfig

    from finetune.export.gguf.file import write_model
    from finetune.inference.chat import load_chat

    file, threads = place.work / f"{method}.gguf", spec.placement.threads
    chat = load_chat(spec, place.work)
    _, make_seconds = timed(
        lambda: write_model(spec.base.folder, file, chat=chat, dtype=GGUF[method], name="lab", threads=threads)
    )
    config = AutoConfig.from_pretrained(spec.base.folder)
    runner, load_seconds = timed(lambda: LlamaCppRunner(file, config, context=place.context, threads=threads))
    tensors = GGUFReader(file).tensors
    layers = [tensor for tensor in tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1]
    return Form(
        runner=runner,
        make_seconds=make_seconds,
        load_seconds=load_seconds,
        code_bytes=sum(int(tensor.n_bytes) for tensor in layers),
        constant_bytes=0,
        weights=sum(int(tensor.n_elements) for tensor in layers),
        memory_bytes=sum(int(tensor.n_bytes) for tensor in tensors),
        disk_bytes=file.stat().st_size,
        tunable=False,
    )


def _onnx(method: str, spec: ModelSpec, place: Workplace) -> Form:
    """Traces the graph once for all its forms, quantizes it and opens it in ONNX Runtime."""
    from transformers import AutoConfig

    from finetune.bench.onnx_model import OnnxModel
    from finetune.export.onnx import FILE, quantize

    traced, trace_seconds = _traced(spec, place.work)
    target = place.work / method
    if ONNX[method] == "float32":
        target, make_seconds = traced, 0.0
    else:
        target.mkdir(exist_ok=True)
        _, make_seconds = timed(lambda: quantize(traced / FILE, target / FILE, dtype=ONNX[method]))
    config = AutoConfig.from_pretrained(spec.base.folder)
    threads = spec.placement.threads
    model, load_seconds = timed(lambda: OnnxModel(config, target / FILE, threads=threads).eval())
    codes, constants, weights = matmul_bytes(target / FILE)
    size = sum(file.stat().st_size for file in target.glob(f"{FILE}*"))
    return Form(
        runner=TransformersRunner(model, spec.load_tokenizer()),
        make_seconds=round(trace_seconds + make_seconds, 2),
        load_seconds=load_seconds,
        code_bytes=codes,
        constant_bytes=constants,
        weights=weights,
        memory_bytes=size,
        disk_bytes=size,
        tunable=False,
    )


def _traced(spec: ModelSpec, work: Path) -> tuple[Path, float]:
    """Returns the folder of the graph in float32, and the seconds that tracing took."""
    from finetune.export.onnx import FILE, trace

    folder = work / "onnx"
    record = folder / "seconds.json"
    if not record.is_file():
        folder.mkdir(exist_ok=True)
        _, seconds = timed(lambda: trace(spec.base.folder, folder / FILE, trust_remote_code=False))
        record.write_text(json.dumps(seconds), encoding="utf-8")
    return folder, float(json.loads(record.read_text(encoding="utf-8")))


def _torch_form(model: Any, spec: ModelSpec, *, make_seconds: float, load_seconds: float, disk_bytes: int) -> Form:
    from finetune.model.load import resident_bytes

    codes, constants, weights = layer_bytes(model)
    return Form(
        runner=TransformersRunner(model, spec.load_tokenizer()),
        make_seconds=make_seconds,
        load_seconds=load_seconds,
        code_bytes=codes,
        constant_bytes=constants,
        weights=weights,
        memory_bytes=resident_bytes(model),
        disk_bytes=disk_bytes,
        tunable=BACKENDS[spec.quantization.method].tunable,
    )
