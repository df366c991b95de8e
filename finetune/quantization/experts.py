"""Experts of mixture models as linear layers, so that 4-bit quantization and LoRA reach them.

transformers 5 holds the experts of a layer in 3-D parameters, which bitsandbytes leaves in 16 bit::

    names = split_experts(model)  # on the meta device; `expert_loading` then loads the layers one by one
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

GATE, UP, DOWN = EXPERT_LAYERS = ("expert_gate", "expert_up", "expert_down")
"""Last segments of the names of an expert's layers. No other layer has them, so that ``lora.targets`` cannot mean both
experts and, say, a shared expert, and peft 0.21 does not take them for 3-D parameters, as it takes ``gate_proj``."""

COMMON = {GATE: "common_gate", UP: "common_up", DOWN: "common_down"}
"""Names of the layers whose output is added to that of every expert's gate, up and down."""

FUSED = ("gate_up_proj", "down_proj")
"""Names of the 3-D parameters in transformers 5."""


class SplitExperts(nn.Module):
    """The experts of one layer; each child is an `Expert`, named by its number.

    Computes what transformers' class computes, with its own gating function. An expert that no token reaches is neither
    dequantized nor multiplied.

    Args:
        experts: transformers' module; its 3-D parameters are not read.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = int(experts.num_experts)
        self.transposed, self.interleaved = bool(experts.is_transposed), not experts.is_concatenated
        with torch.device("meta"):
            for number in range(self.experts):
                self.add_module(str(number), Expert(experts, interleaved=self.interleaved))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns the weighted sum of the experts' outputs, shape (tokens, width).

        Args:
            hidden_states: Shape (tokens, width).
            top_k_index: Numbers of the experts of each token, shape (tokens, k).
            top_k_weights: Their weights, shape (tokens, k).
        """
        tokens, k = top_k_index.shape
        order = top_k_index.reshape(-1).argsort(stable=True)
        # A permutation: gradients that meet in one row would be added in the order in which threads arrive.
        inputs = hidden_states.repeat_interleave(k, dim=0)[order].split(self.counts(top_k_index))
        common = {layer: self._modules[name] for layer, name in COMMON.items() if name in self._modules}
        outputs = [expert(x, common) for expert, x in zip(self.each(), inputs, strict=True) if len(x)]
        by_token = torch.cat(outputs)[order.argsort()].view(tokens, k, -1)
        result: Tensor = (by_token * top_k_weights[..., None]).sum(dim=1)
        return result.to(hidden_states.dtype)

    def each(self) -> list[Any]:
        """Returns the experts in the order of their numbers."""
        return [self._modules[str(number)] for number in range(self.experts)]

    def add_common_layers(self) -> None:
        """Adds layers of zeros that all experts share, for an adapter to change; not a second time."""
        first = self.each()[0]
        for layer, name in COMMON.items():
            if name not in self._modules:
                own = first._modules[layer]
                device = next(own.parameters()).device
                self.add_module(name, ZeroLinear(own.in_features, own.out_features, device=device))

    def counts(self, top_k_index: Tensor) -> list[int]:
        """Counts the tokens of each expert; on a GPU it waits for the router."""
        counts: list[int] = torch.bincount(top_k_index.reshape(-1), minlength=self.experts).tolist()
        return counts


class Expert(nn.Module):
    """Gate, up and down of one expert.

    Args:
        experts: transformers' module, for the widths and the gating function.
        interleaved: Whether that function takes gate and up in turns instead of one after the other.
    """

    def __init__(self, experts: Any, *, interleaved: bool) -> None:
        super().__init__()
        outer, inner = experts.down_proj.shape[-2:]
        width, hidden = (outer, inner) if experts.is_transposed else (inner, outer)
        bias = bool(experts.has_bias)
        self.add_module(GATE, nn.Linear(hidden, width, bias=bias))
        self.add_module(UP, nn.Linear(hidden, width, bias=bias))
        self.add_module(DOWN, nn.Linear(width, hidden, bias=bias))
        self.interleaved = interleaved
        self.gating = (experts,)  # in a tuple, so that it is not a child with parameters

    def forward(self, x: Tensor, common: dict[str, Any]) -> Tensor:
        """Returns the expert's output for tokens of shape (tokens, width).

        Args:
            x: The tokens.
            common: Layers whose output is added to that of the expert's own, by the names of those.
        """

        def output(layer: str, x: Tensor) -> Tensor:
            own: Tensor = self._modules[layer](x)  # type: ignore[misc]
            return own + common[layer](x) if layer in common else own

        gate, up = output(GATE, x), output(UP, x)
        both = torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)
        return output(DOWN, self.gating[0]._apply_gate(both))


class ZeroLinear(nn.Linear):
    """A linear layer of zeros without a stored weight, which peft adapts as it adapts any linear layer."""

    def __init__(self, in_features: int, out_features: int, *, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = in_features, out_features, None  # type: ignore[assignment]
        self.register_buffer("weight", torch.empty(0, in_features, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns zeros, shape (..., out_features)."""
        return x.new_zeros((*x.shape[:-1], self.out_features))


def fused_experts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields name and module of the experts that transformers holds in 3-D parameters."""
    for name, module in model.named_modules():
        if any(parameter.dim() == 3 and name in FUSED for name, parameter in module.named_parameters(recurse=False)):
            yield name, module


def is_covered(experts: Any) -> bool:
    """Returns whether `SplitExperts` computes what this class of transformers computes.

    That is so where a gated expert has the parameters that transformers' own grouped products read, and no others.
    """
    if not getattr(experts, "has_gate", False) or getattr(experts, "has_post_expert_norm", True):
        return False
    names = {name for name, _ in experts.named_parameters()}
    return names == ({*FUSED, *(f"{name}_bias" for name in FUSED)} if experts.has_bias else set(FUSED))


def split_experts(model: nn.Module) -> list[str]:
    """Replaces the experts of a model on the meta device by linear layers without weights; returns their names.

    Experts of a class that is not covered stay as they are.
    """
    covered = [(name, experts) for name, experts in fused_experts(model) if is_covered(experts)]
    for name, experts in covered:
        model.set_submodule(name, SplitExperts(experts))
        for parameter in [key for key, _ in experts.named_parameters()]:
            delattr(experts, parameter)
    return [name for name, _ in covered]


def split_modules(model: nn.Module) -> dict[str, SplitExperts]:
    """Returns the split experts of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SplitExperts)}


def join_codes(model: nn.Module) -> None:
    """Moves the codes of a layer's experts into one tensor for gate, up and down each; values stay the same.

    torch's allocator on a GPU hands out tensors below 1 MiB from segments of 2 MiB: two experts of 0.75 MiB would take
    one, and a quarter of it would stay unused. Source: torch's c10/cuda/CUDACachingAllocator.h.
    """
    for experts in split_modules(model).values():
        for layer in EXPERT_LAYERS:
            weights = [getattr(expert, layer).weight for expert in experts.each()]
            if all(hasattr(weight, "quant_state") for weight in weights):
                for weight, codes in zip(weights, torch.stack([weight.data for weight in weights]), strict=True):
                    weight.data = codes
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_expert_layer(name: str) -> bool:
    """Returns whether a layer belongs to split experts, by its name or that of one of its parameters."""
    return any(layer in name.split(".") for layer in EXPERT_LAYERS)


def halves(both: Tensor, *, transposed: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Splits one expert's gate and up, each of shape (outputs, inputs) or, of a bias, (outputs,).

    Args:
        both: As the 3-D parameter has them for one expert.
        transposed: Whether it has the outputs last.
        interleaved: Whether gate and up take turns.
    """
    if transposed and both.dim() == 2:
        both = both.t()
    if interleaved:
        return both[0::2], both[1::2]
    middle = len(both) // 2
    return both[:middle], both[middle:]


def joined(gate: Tensor, up: Tensor, *, transposed: bool, interleaved: bool) -> Tensor:
    """Reverses `halves`."""
    both = torch.stack((gate, up), 1).flatten(0, 1) if interleaved else torch.cat((gate, up))
    return both.t() if transposed and both.dim() == 2 else both
