"""Linear layers in int8 whose inputs are int8 too (W8A8), and SmoothQuant's migration between the two.

Three ways to find the scale of the inputs:

- ``w8a8_dynamic``: one for each token, from its largest value, while the model runs.
- ``w8a8_static``: one for the whole layer, from the largest value that calibration saw.
- ``w8a8_smoothquant``: as static, after each input channel is divided by a factor that its weights are multiplied by.

Weights have one scale for each output. A static scale and the factors are one multiplication, so smoothing costs
nothing while the model runs, and needs no norm before the layer to be folded into.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 127
MIGRATION = 0.5
"""Share of the difficulty that moves from activations to weights. Source: Xiao et al. 2023, SmoothQuant, section 4."""

SMALLEST = 1e-5
"""Floor of a largest value, so that nothing is divided by zero."""


class Int8Linear(nn.Module):
    """A linear layer that multiplies int8 inputs by int8 weights and adds up in int32.

    Args:
        weight: Shape (outputs, inputs).
        bias: Shape (outputs,), or None.
        largest: Largest input of each channel that calibration saw, shape (inputs,); None for a scale per token.
        smooth: Whether to migrate; needs ``largest``.
    """

    codes: Tensor
    scales: Tensor
    multiplier: Tensor | None
    """Turns an input into codes, shape (1,) or (inputs,); None where each token has its own."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, largest: Tensor | None, smooth: bool) -> None:
        super().__init__()
        weight, step, multiplier = weight.detach().float(), torch.ones(1), None
        if largest is not None:
            factors = migration(largest, weight.abs().amax(0)) if smooth else torch.ones(1)
            weight = weight * factors
            step = (largest / factors).max().clamp_min(SMALLEST) / LARGEST
            multiplier = 1 / (factors * step)
        scales = weight.abs().amax(1).clamp_min(SMALLEST) / LARGEST
        self.bias = bias
        self.register_buffer("codes", (weight / scales[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scales * step)
        self.register_buffer("multiplier", multiplier)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the product, shape (..., outputs), in the dtype of the input."""
        wide, scales = x.float().flatten(0, -2), self.scales
        if self.multiplier is None:
            step = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / LARGEST
            wide, scales = wide / step, scales * step
        else:
            wide = wide * self.multiplier
        codes = wide.round().clamp(-LARGEST, LARGEST).to(torch.int8)
        y = torch._int_mm(codes, self.codes.t()).float() * scales
        y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def constants(self) -> int:
        """Returns the bytes of scales and multipliers."""
        return self.scales.nbytes + (0 if self.multiplier is None else self.multiplier.nbytes)


def migration(largest: Tensor, weight_largest: Tensor) -> Tensor:
    """Returns what each input channel is divided by, and its weights multiplied by, shape (inputs,).

    Args:
        largest: Largest input of each channel.
        weight_largest: Largest weight of each channel.

    Source: Xiao et al. 2023, SmoothQuant, equation 4.
    """
    return largest.clamp_min(SMALLEST) ** MIGRATION / weight_largest.clamp_min(SMALLEST) ** (1 - MIGRATION)


def replace_layers(model: Any, method: str, sequences: Sequence[Sequence[int]]) -> list[Int8Linear]:
    """Replaces all linear layers but the head, in place, and returns the new ones.

    Args:
        model: A dense causal language model.
        method: ``w8a8_dynamic``, ``w8a8_static`` or ``w8a8_smoothquant``.
        sequences: Token ids to calibrate on; a scale per token needs none.
    """
    head = model.get_output_embeddings()
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head
    }
    largest = {} if method == "w8a8_dynamic" else largest_inputs(model, layers, sequences)
    made = []
    for name, layer in layers.items():
        bias = None if layer.bias is None else layer.bias.detach()
        smooth = method == "w8a8_smoothquant"
        made.append(Int8Linear(layer.weight, bias, largest=largest.get(name), smooth=smooth))
        model.set_submodule(name, made[-1])
    return made


def largest_inputs(model: Any, layers: dict[str, nn.Linear], sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Returns the largest absolute input of each channel of each layer, by the layer's name."""
    largest: dict[str, Tensor] = {}

    def hook_of(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].detach().flatten(0, -2).abs().amax(0).float()
            largest[name] = torch.maximum(largest[name], seen) if name in largest else seen

        return hook

    hooks = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for sequence in sequences:
            model(input_ids=torch.tensor([list(sequence)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return largest
