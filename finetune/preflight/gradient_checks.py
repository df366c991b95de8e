"""Checks that take a few passes over one batch.

Every bound on rounding starts from the unit roundoff of bfloat16, 2^-8 or 0.4 %. The differences that were seen are
from one x86 CPU; the bounds leave at least a factor of two for other processors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from finetune.inference.generation import generate
from finetune.inference.losses import row_losses
from finetune.preflight.context import CheckContext, CheckResult, CheckSkipped

FUSED_BOUND = 0.1
"""Two orders of rounding, some hundred operations deep, differ by about 2^-8 times the root of the depth: 2 to 5 % were
seen on models of 2 to 30 layers. A missing term or mask is beyond 30 %."""

ACCUMULATED_BOUND, ACCUMULATED_LOSS_BOUND = 0.05, 0.01
"""Rows round differently alone and in a batch: 1 % for gradients (a few times 2^-8) and 0.01 % for losses (means over
many tokens) were seen. A mean of the micro-batches' means differed by 37 to 51 % and 0.6 to 24 %, since every second
row trains on a quarter of its tokens."""

REGROUPED_BOUND = 0.1
"""GPU only: cuBLAS, bitsandbytes and attention choose their kernels by the number of rows, so a row next to others is
rounded as in another order of operations: FUSED_BOUND's 2 to 5 %, and not a CPU's 1 %."""

REORDERED_BOUND = 0.01
"""GPU only: kernels that add in the order in which their blocks end round single sums differently. A repacked weight
changed 90 % of the gradient."""

REPEATS = 3
PACKED_BOUND = 0.25
"""Share of a contamination's effect that rounding may reach. With 2^-8 per operation, 1 to 10 % were seen."""

ROWS = "trainable_tokens_delta"
"""Embedding rows of single tokens, as peft names them: their gradient is zero without documents that have the token."""

ROUTERS = "modules_to_save"
"""Routers that are trained whole, as peft names them."""

ADAPTER = ("lora_A", "lora_B", "lora_embedding", "lora_magnitude", ROWS, ROUTERS)
"""Parts of the names of an adapter's parameters, as peft names them."""


def check_fused_layers(context: CheckContext) -> CheckResult:
    """Compares the gradient of fused layers, kernels and loss with that of transformers and peft."""
    fused = context.noisy_gradients
    with context.with_noisy_lora_b(), context.fusion.disabled():
        original = context.gradients()
    difference = relative_difference(fused, original)
    passed = difference <= FUSED_BOUND
    return CheckResult(
        passed=passed,
        figure=f"gradients differ by {difference:.1%}" + ("" if passed else "; so the original layers are trained"),
        bound=f"{FUSED_BOUND:.0%}",
    )


def check_packing(context: CheckContext) -> CheckResult:
    """Compares the loss of documents packed in one row with their loss alone.

    How large rounding may be depends on the model. The difference is therefore compared with the one that attention
    across documents would make: the loss of the same row as a single long document.
    """
    documents = context.rows.packed
    if not context.job.trainable.packing:
        raise CheckSkipped("layers carry a state from token to token, so every document trains in a row of its own")
    if len(documents) < 2:
        raise CheckSkipped("the data are a single document, so there is nothing to pack it with")
    alone = context.token_losses(documents, layout="alone")
    packed = (context.token_losses(documents, layout="packed") - alone).abs().mean()
    contaminated = (context.token_losses(documents, layout="one document") - alone).abs().mean()
    share = float(packed / contaminated.clamp(min=1e-9))
    figure = f"{len(documents)} documents, {float(packed):.2g} nats per token, {share:.1%} of full contamination"
    return CheckResult(
        passed=share <= PACKED_BOUND,
        figure=figure + ("" if share <= PACKED_BOUND else "; so every document trains in a row of its own"),
        bound=f"{PACKED_BOUND:.0%}",
    )


def check_accumulation(context: CheckContext) -> CheckResult:
    """Compares one step of the run's own trainer over the same rows, one by one and as one batch."""
    rows = context.rows.accumulated
    count = len(rows)
    if count < 2:
        raise CheckSkipped("the data are a single row, so there is nothing to accumulate")
    with context.with_noisy_lora_b():
        loss, gradients = context.trainer.gradients(rows, micro_batch=1)
        batch_loss, batch_gradients = context.trainer.gradients(rows, micro_batch=count)
    difference, loss_difference = relative_difference(gradients, batch_gradients), abs(loss / batch_loss - 1)
    bound = REGROUPED_BOUND if context.device.startswith("cuda") else ACCUMULATED_BOUND
    return CheckResult(
        passed=difference <= bound and loss_difference <= ACCUMULATED_LOSS_BOUND,
        figure=f"{count} rows: loss {loss:.4f} and {batch_loss:.4f}, gradients differ by {difference:.1%}",
        bound=f"loss {ACCUMULATED_LOSS_BOUND:.0%}, gradients {bound:.0%}",
    )


def check_gradients(context: CheckContext) -> CheckResult:
    """Counts the adapter matrices that get a gradient other than zero, and the base weights that get any.

    Experts that no token of the batch reaches get none, and are counted apart.
    """
    gradients = context.noisy_gradients
    names = [name for name, _ in context.model.named_parameters() if any(part in name for part in ADAPTER)]
    idle = experts_without_tokens(names, gradients)
    adapter = [name for name in names if expert_of(name) not in idle]
    dead = [name for name in adapter if name not in gradients or not (gradients[name].any() or ROWS in name)]
    stray = [name for name in gradients if name not in names]
    figure = f"{len(adapter) - len(dead)} of {len(adapter)} matrices, {len(stray)} base weights"
    if idle:
        figure += f"; no token reached {len(idle)} experts"
    if dead or stray:
        figure += f"; {'without a gradient' if dead else 'trained too'}: {', '.join((dead + stray)[:3])}"
    passed = bool(adapter) and not dead and not stray
    return CheckResult(passed=passed, figure=figure, bound="all matrices, 0 base weights")


def expert_of(name: str) -> str | None:
    """Returns the name of the expert that a parameter belongs to; None for other parameters."""
    from finetune.quantization.experts import is_expert_layer

    return name.partition(".expert_")[0] if is_expert_layer(name) else None


def experts_without_tokens(names: list[str], gradients: dict[str, Tensor]) -> set[str | None]:
    """Returns the experts none of whose matrices has a gradient; none where that holds for all experts of a layer."""
    experts = {expert_of(name) for name in names} - {None}
    idle = experts - {expert_of(name) for name in gradients}
    busy_layers = {str(expert).rpartition(".")[0] for expert in experts - idle}
    return {expert for expert in idle if str(expert).rpartition(".")[0] in busy_layers}


def check_identity(context: CheckContext) -> CheckResult:
    """Compares the logits of the adapted model before the first step with those of the base."""
    base = context.logits(adapter=False)
    difference = best_of_repeats(lambda: float((context.logits(adapter=True) - base).abs().max()))
    share = context.job.trainable.lora.step0_bound
    bound = math.inf if share is None else share * float(base.std())
    return CheckResult(
        passed=difference <= bound,
        figure=f"largest logit difference {difference:g}",
        bound="none: this variant of LoRA does not start as the base, by design" if share is None else f"{bound:g}",
    )


def check_evaluation(context: CheckContext) -> CheckResult:
    """Compares gradients, frozen weights and saved bytes before and after an evaluation and a save.

    bitsandbytes 0.50.2 repacks 4-bit weights at the first evaluation on AVX512-BF16 CPUs, which cuts off gradients.
    """
    before, documents = context.noisy_gradients, context.rows.documents
    with context.with_noisy_lora_b():
        weights, saved = context.frozen_samples(), _saved_sha256(context)
        context.logits(adapter=True)
        if context.config.level == "full":
            longest = max(len(document["input_ids"]) for document in documents)
            row_losses(context.model, documents, batch_tokens=longest)
            prompts = [documents[0]["input_ids"]]
            generate(context.model, context.tokenizer, prompts, max_new_tokens=2, batch_rows=1)
        same = saved == _saved_sha256(context)
        changed = sum(not torch.equal(old, new) for old, new in zip(weights, context.frozen_samples(), strict=True))
        difference = best_of_repeats(lambda: relative_difference(before, context.gradients()))
    bound = REORDERED_BOUND if context.device.startswith("cuda") else 0.0
    return CheckResult(
        passed=difference <= bound and not changed and same,
        figure=f"gradients differ by {100 * difference:.2g}%, {changed} of {len(weights)} frozen weights and "
        f"{'none' if same else 'some'} of the saved bytes changed",
        bound=f"{bound:.0%}, 0, none",
    )


def _saved_sha256(context: CheckContext) -> str:
    folder: Path = context.folder / "saved"
    context.model.save_pretrained(folder)
    with open(folder / "adapter_model.safetensors", "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def relative_difference(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Returns the L2 norm of the difference over that of ``expected``; infinite where the names differ."""
    if gradients.keys() != expected.keys():
        return math.inf
    difference = sum(float((gradients[name] - expected[name]).square().sum()) for name in expected)
    return math.sqrt(difference / max(sum(float(gradient.square().sum()) for gradient in expected.values()), 1e-30))


def best_of_repeats(measure: Callable[[], float]) -> float:
    """Returns the smallest of a few measurements, and 0 as soon as one is 0.

    A busy CPU's threaded kernels sometimes round a pass differently. Two computations that differ never agree to the
    bit, so one exact agreement is enough.
    """
    smallest = math.inf
    for _ in range(REPEATS):
        smallest = min(smallest, measure())
        if smallest == 0.0:
            break
    return smallest
