"""Counts what a quantized model takes: codes and constants of its layers, and its files."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

SHARD = "2GB"


def layer_bytes(model: Any) -> tuple[int, int, int]:
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


def saved_bytes(model: Any, quantization: Any) -> int:
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


def matmul_bytes(file: Path) -> tuple[int, int, int]:
    """Returns bytes of a graph's matrices, bytes of their scales and zero points, and the number of weights."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    item = {
        tensor.name: onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize for tensor in graph.initializer
    }
    codes = constants = weights = 0
    for node in graph.node:
        if not node.op_type.startswith("MatMul") or len(node.input) < 2 or node.input[1] not in sizes:
            continue
        name = node.input[1]
        fields = {attribute.name: attribute.i for attribute in node.attribute}
        weights += fields["K"] * fields["N"] if "K" in fields else sizes[name]
        codes += sizes[name] * item[name]
        scale = name.removesuffix("_quantized") + "_scale"
        parts = {*node.input[2:], scale} & sizes.keys()
        constants += sum(sizes[part] * item[part] for part in parts)
    return codes, constants, weights
