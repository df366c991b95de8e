"""Rounds a dense model to 4 bits by calibration, with auto-round, in a process of its own.

Two methods, each written in the format that servers read under its name:

- ``gptq``: SignRound, which trains each weight's rounding and each group's range against the block's dense output
  (Cheng et al. 2023, arXiv 2309.05516), symmetric, in GPTQ's format. It is not the GPTQ algorithm.
- ``awq``: AWQ's scales, searched on the activations and folded into the layers before (Lin et al. 2024), then rounding
  to nearest, asymmetric, in AWQ's format.

The files that auto-round saves are not used: of a float32 checkpoint it replaces norms that it saved in 16 bits by the
original ones, which lack AWQ's scales (auto-round 0.16.1, utils/missing_tensors.py).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError
from finetune.quantization.config import GROUPS

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4
MULTIPLE = 32
"""Outputs of a layer must be a multiple: eight codes a word, and whole words of zero points for the kernels. auto-round
leaves other layers in 16 bit, which the formats have no standard way to write."""

BATCH = 8
FORMATS = {"gptq": "auto_gptq", "awq": "auto_awq"}
"""auto-round's names of the formats."""


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How a model is rounded.

    Attributes:
        method: ``gptq`` or ``awq``.
        group_size: Inputs that share a scale.
        steps: Of SignRound, for each block; ``gptq`` only.
        seed: Of auto-round's order of batches.
    """

    method: str
    group_size: int
    steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """What was made.

    Attributes:
        layers: Layers that are packed.
        seconds: For loading, calibration, rounding and writing.
        version: Of auto-round.
    """

    layers: int
    seconds: float
    version: str


def shape_problem(shapes: list[tuple[str, int, int]], *, group_size: int) -> str:
    """Explains which layers cannot be rounded in groups; empty where all can.

    Args:
        shapes: Name, outputs and inputs of each linear layer.
        group_size: Inputs that share a scale.
    """
    uneven = sorted({f"{name.rpartition('.')[2]} ({inputs})" for name, _, inputs in shapes if inputs % group_size})
    if uneven:
        fitting = [size for size in GROUPS if all(inputs % size == 0 for _, _, inputs in shapes)]
        remedy = f"set group_size={fitting[-1]}" if fitting else "no group size of servers does; choose another format"
        return f"group_size={group_size} does not divide the inputs of {', '.join(uneven)}; {remedy}"
    narrow = sorted({f"{name.rpartition('.')[2]} ({outputs})" for name, outputs, _ in shapes if outputs % MULTIPLE})
    if narrow:
        return (
            f"the outputs of {', '.join(narrow)} are not a multiple of {MULTIPLE}, which kernels for 4 bits need; "
            "choose another format"
        )
    return ""


def round_model(source: Path, target: Path, rounding: Rounding, *, sequences: list[list[int]], **where: Any) -> Rounded:
    """Rounds a checkpoint in a fresh process and writes a quantized copy of it.

    Args:
        source: Folder of the dense checkpoint and its tokenizer.
        target: Folder for weights and config.json; made where it does not exist.
        rounding: Method and settings.
        sequences: Token ids to calibrate on, all of the same length.
        where: ``device``, ``dtype``, ``threads`` and ``trust_remote_code`` of the computation.

    Raises:
        ModelError: auto-round cannot round this model.
    """
    from finetune.inference.fresh_process import FreshProcessError, run_in_fresh_process

    target.mkdir(parents=True, exist_ok=True)
    request = {
        "source": source.resolve(),
        "target": target.resolve(),
        "rounding": rounding,
        "sequences": sequences,
        **where,
    }
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if where["device"] == "cpu" else {}
    try:
        return Rounded(**run_in_fresh_process(__name__, request, work=target, environment=hidden))
    except FreshProcessError as error:
        raise ModelError(f"auto-round cannot round this model: {error}") from error


def make(request: dict[str, Any]) -> Rounded:
    """Rounds the model that a request names; see `round_model`."""
    import tempfile

    import torch

    from finetune.quantization.rewrite import rewrite_checkpoint

    started = time.monotonic()
    torch.set_num_threads(request["threads"])
    source, target, rounding = Path(request["source"]), Path(request["target"]), Rounding(**request["rounding"])
    model = _load(source, request)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        rounded = _compressor(model, rounding, request).quantize_and_save(scratch, format=FORMATS[rounding.method])[0]
    state = {name: tensor.cpu() for name, tensor in rounded.state_dict().items()}
    config = dict(rounded.config.quantization_config)
    packed = _Packed(state)
    rewrite_checkpoint(source, target, packed.replace, quantization_config=config)
    packed.check(source)
    seconds = round(time.monotonic() - started, 1)
    return Rounded(layers=len(packed.layers), seconds=seconds, version=version("auto-round"))


def _load(source: Path, request: dict[str, Any]) -> Any:
    import torch

    from finetune.model.text_only import from_pretrained

    return from_pretrained(
        source,
        dtype=getattr(torch, request["dtype"]),
        trust_remote_code=request["trust_remote_code"],
        use_safetensors=True,
    )


def _compressor(model: Any, rounding: Rounding, request: dict[str, Any]) -> Any:
    """Returns auto-round's object for one model."""
    import torch
    from auto_round import AutoRound
    from auto_round.algorithms.quantization.rtn.config import RTNConfig
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
    from auto_round.algorithms.transforms.awq import AWQConfig
    from transformers import AutoTokenizer

    size, sequences = rounding.group_size, [torch.tensor([ids]) for ids in request["sequences"]]
    if rounding.method == "awq":
        algorithms = [AWQConfig(), RTNConfig(group_size=size, sym=False, disable_opt_rtn=True)]
    else:
        algorithms = [SignRoundConfig(iters=rounding.steps, group_size=size, sym=True)]
    return AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(request["source"], trust_remote_code=request["trust_remote_code"]),
        scheme="W4A16",
        alg_configs=algorithms,
        dataset=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in sequences],
        nsamples=len(sequences),
        seqlen=len(request["sequences"][0]),
        batch_size=BATCH,
        device_map=request["device"],
        enable_torch_compile=False,
        seed=rounding.seed,
        low_cpu_mem_usage=False,  # otherwise rounded blocks are written and dropped
        amp=request["dtype"] != "float32",
    )


class _Packed:
    """The tensors of a rounded model, under the names of the checkpoint that it was made from.

    Args:
        state: Of the rounded model.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        from finetune.quantization.packed_checkpoint import is_quantized, layer_of

        layers: dict[str, list[str]] = {}
        for name in state:
            layers.setdefault(layer_of(name), []).append(name)
        self.state = state
        self.layers = {layer: names for layer, names in layers.items() if is_quantized(names)}
        self.written: set[str] = set()

    def replace(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Returns the codes and constants of a rounded layer; other tensors as calibration left them."""
        from finetune.model.text_only import decoder_name

        own = decoder_name(name)
        layer, key = own.removesuffix(".weight"), name.removesuffix(".weight")
        if layer in self.layers:
            self.written.add(layer)
            return {f"{key}.{part.removeprefix(layer + '.')}": self.state[part] for part in self.layers[layer]}
        return {name: self.state[own].to(tensor.dtype) if own in self.state else tensor}

    def check(self, source: Path) -> None:
        """Requires that every rounded layer was written, and that there is one.

        Raises:
            ModelError: The checkpoint holds them under other names, or none.
        """
        lost = sorted(self.layers.keys() - self.written)
        if lost or not self.layers:
            raise ModelError(
                f"{source} holds no weight of {lost[0]} under this name" if lost else "no layer was rounded"
            )


if __name__ == "__main__":
    from finetune.inference.fresh_process import serve_request

    serve_request(make)
