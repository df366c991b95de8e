"""``plan.exact``: counts a step of the real modelling code tensor by tensor, and compares it with the closed form."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError
from finetune.plan import weights
from finetune.plan.activations import activations
from finetune.plan.inputs import FLOAT, PlanInputs, block_bytes
from finetune.plan.settings import planned_dtype
from finetune.plan.weights import SMALLEST_8BIT_ELEMENTS, STATE_BLOCK

if TYPE_CHECKING:
    from finetune.config import RunConfig
    from finetune.hardware import Machine


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term by both methods, in bytes of one process without shards."""

    closed: int
    exact: int

    @property
    def difference(self) -> float:
        """Returns the closed form's relative difference from the count."""
        return self.closed / self.exact - 1 if self.exact else float(self.closed != 0)


def compare(config: RunConfig, inputs: PlanInputs, machine: Machine) -> dict[str, Term]:
    """Compares every term that can be counted; ``together`` is their sum at the step's peak.

    Raises:
        ModelError: The model cannot be counted.
    """
    alone = dataclasses.replace(inputs, strategy="single", processes=1, offload=False)
    counted = count(config, alone, dtype=planned_dtype(config, machine))
    frozen, kept = weights.weight_bytes(alone), activations(alone)
    at_peak = max(kept.logits, kept.layer + kept.logits_held) + weights.workspace_bytes(alone)
    closed = {
        "weights": frozen.codes,
        "constants": frozen.constants,
        "unquantized": frozen.unquantized,
        "cached": weights.cached_bytes(alone),
        "adapter": weights.adapter_bytes(alone),
        "gradients": weights.gradient_bytes(alone),
        "optimizer": weights.optimizer_bytes(alone),
        "kept activations": kept.stored,
        "at the peak besides": at_peak,
    }
    terms = {
        name: Term(closed=round(closed[name]), exact=round(counted[name]))
        for name in closed
        if closed[name] or counted[name]
    }
    together = Term(
        closed=sum(term.closed for term in terms.values()), exact=sum(term.exact for term in terms.values())
    )
    return terms | {"together": together}


def count(config: RunConfig, inputs: PlanInputs, *, dtype: str) -> dict[str, float]:
    """Counts the bytes of one process by term, on tensors without contents: no download, no memory, no GPU."""
    import torch
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    from finetune.plan.fake import build_model, materialize

    model, quantized = build_model(config, inputs, dtype=dtype)
    with FakeTensorMode():
        counted = count_quantized(model, quantized, inputs)
        materialize(model, quantized)
        trained = [p for p in model.parameters() if p.requires_grad]
        quantized_weights = {id(model.get_submodule(name).weight) for name in quantized}
        rest = [p for p in model.parameters() if not p.requires_grad and id(p) not in quantized_weights]
        linear = {id(module.weight) for name, module in model.named_modules() if _is_plain_linear(name, module)}
        counted["weights"] += sum(_size(p) for p in rest if id(p) in linear)
        counted["unquantized"] = sum(_size(p) for p in rest if id(p) not in linear)
        counted["adapter"] = counted["gradients"] = sum(_size(p) for p in trained)
        counted["optimizer"] = sum(state_bytes(p.numel(), p.element_size(), inputs.optimizer) for p in trained)
        try:
            counted |= count_step(model, quantized, inputs, dtype=getattr(torch, dtype))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            family = inputs.architecture.family
            raise ModelError(
                f"plan --exact: {family} chooses its weights by the data, which cannot be counted; leave --exact out"
            ) from error
    return counted


def count_step(model: Any, quantized: list[str], inputs: PlanInputs, *, dtype: Any) -> dict[str, float]:
    """Counts the bytes alive when the forward pass ends, and those that the backward pass adds at its worst moment."""
    import torch

    from finetune.kernels.attention import Documents
    from finetune.kernels.autograd import FusedLinearCrossEntropy
    from finetune.kernels.documents import attending_by, use_documents
    from finetune.kernels.forms import head_form
    from finetune.plan.fake import LiveBytes, fused_layers, replace_quantized_layers, use_gpu_dropout

    if not inputs.kernels.fused:
        replace_quantized_layers(model, quantized, dtype=dtype, keeps_input=inputs.method == "int8")
    if inputs.device == "cuda" or inputs.kernels.fused:  # fused layers keep neither a mask nor a copy
        use_gpu_dropout(model)
    if inputs.kernels.documents:
        use_documents(model.get_base_model())
    with fused_layers(model, inputs, dtype=dtype) as kernels:
        for parameter in model.parameters():  # gradients of the previous micro-batch, to which the step adds
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        resident = [*model.parameters(), *model.buffers(), *gradients]
        alive = LiveBytes(resident, size=lambda size: block_bytes(size, inputs))
        batch = fake_batch(inputs)
        documents = Documents(batch["cu_seq_lens_q"], inputs.tokens) if inputs.kernels.documents else None
        autocast = torch.autocast(
            "cpu",
            dtype,
            enabled=not (inputs.kernels.fused and inputs.kernels.loss_on_trained_tokens) and dtype != torch.float32,
        )
        with alive:
            with autocast:
                causal = model.get_base_model()
                with attending_by(documents):
                    recorded = {"output_router_logits": True} if inputs.routers else {}
                    outputs = causal.get_decoder()(**batch, use_cache=False, **recorded)
                    hidden, routers = outputs.last_hidden_state, outputs.router_logits if inputs.routers else ()
                    del outputs  # it keeps what it holds
                ended = alive.live
                if inputs.kernels.loss_on_trained_tokens:
                    head = causal.get_output_embeddings().weight
                    trained = hidden.reshape(-1, hidden.shape[-1]).clone().to(head.dtype)
                    targets, form = torch.empty(len(trained), dtype=torch.long), head_form(causal.config)
                    assert form is not None, "the plan splits no head whose form is unknown"
                    loss = FusedLinearCrossEntropy.apply(trained, head, targets, kernels, form.softcap)
                    del hidden, trained
                else:  # TRL's own loss is taken from the closed form: it keeps the hidden states
                    loss = hidden.float().sum()
                    for logits in routers:  # as their auxiliary loss keeps them
                        loss = loss + logits.float().softmax(-1).sum()
                    alive.peak = max(alive.peak, ended + activations(inputs).logits)
            stored = alive.live  # autocast's copies of what is not kept are freed
            loss.backward()
    return {"kept activations": stored, "at the peak besides": alive.peak - stored, "cached": _cached(model, inputs)}


def fake_batch(inputs: PlanInputs) -> dict[str, Any]:
    """Returns a micro-batch as the collator builds it: documents end to end, or in rows where layers would mix them."""
    import torch

    from finetune.plan.fake import FakeBorders

    documents = inputs.rows * inputs.documents
    if not inputs.kernels.flat:
        return {"input_ids": torch.empty((documents, inputs.tokens), dtype=torch.long)}
    ids = torch.empty((1, inputs.step_tokens), dtype=torch.long)
    borders = FakeBorders(documents=documents, tokens=inputs.tokens)
    lengths = {"max_length_q": inputs.tokens, "max_length_k": inputs.tokens}
    return {
        "input_ids": ids,
        "position_ids": torch.empty_like(ids),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        **lengths,
    }


def count_quantized(model: Any, quantized: list[str], inputs: PlanInputs) -> dict[str, float]:
    """Counts quantized weights and their constants with bitsandbytes' own operators."""
    import torch

    codes = constants = 0.0
    for name in quantized:
        layer = model.get_submodule(name)
        weight = torch.empty((layer.out_features, layer.in_features), dtype=torch.float16)
        if inputs.method == "int8":
            code, scale, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(weight, 0.0)
        else:
            code, scale = torch.ops.bitsandbytes.quantize_4bit(weight, weights.BLOCK, inputs.method, torch.uint8)
        codes += _size(code)
        if inputs.double:
            small, second = torch.ops.bitsandbytes.quantize_blockwise(scale, torch.empty(256), weights.DOUBLE_BLOCK)
            constants += _size(small) + _size(second)
        else:
            constants += _size(scale)
    return {"weights": codes, "constants": constants}


def state_bytes(elements: int, element_bytes: int, optimizer: str) -> float:
    """Returns the optimizer states of one tensor, by the rules of `weights.optimizer_bytes`."""
    states = 1 if "lion" in optimizer else 2
    if optimizer.endswith("_8bit") and elements >= SMALLEST_8BIT_ELEMENTS:
        return states * (elements + FLOAT * math.ceil(elements / STATE_BLOCK))
    return states * elements * (FLOAT if optimizer.endswith("bit") else element_bytes)


def _cached(model: Any, inputs: PlanInputs) -> float:
    """Counts dense copies that fused layers keep next to the quantized weights."""
    if not (inputs.kernels.cached or weights.stays_mapped(inputs)):
        return 0
    linear = [module for name, module in model.named_modules() if name.endswith("base_layer")]
    return sum(module.weight.numel() * inputs.compute_bytes for module in linear)


def _is_plain_linear(name: str, module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear) and "lora_" not in name and "lm_head" not in name


def _size(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())
