"""The proofs of each level, in the order in which they run; each says what it holds and the likely cause where it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetune.preflight import gradient_checks, label_check, memory_check, training_checks
from finetune.preflight.context import CheckContext, CheckResult


@dataclass(frozen=True, kw_only=True)
class Check:
    """One of them.

    Attributes:
        name: In the manifest.
        sentence: What it holds.
        prove: Raises `CheckSkipped` where it cannot be tried.
        cause: Likely, where it fails.
        only_full: Whether ``preflight=quick`` leaves it out.
    """

    name: str
    sentence: str
    prove: Callable[[CheckContext], CheckResult]
    cause: str
    only_full: bool = False


SPEED = Check(
    name="speed",
    sentence="quick steps give the gradient of plain ones",
    prove=gradient_checks.quick_steps_equal_plain_ones,
    cause="this model computes something that the fused layers leave out; kernels=plain does without them",
)
"""Where it fails, quick steps are turned off and the run goes on."""

ISOLATION = Check(
    name="packing",
    sentence="a packed document has the loss that it has alone",
    prove=gradient_checks.packing_keeps_documents_apart,
    cause="this attention implementation ignores position_ids; model.attention=sdpa heeds them",
)
"""Where it fails, each document gets a row of its own and the run goes on."""

CHECKS = (
    SPEED,
    ISOLATION,
    Check(
        name="trained_text",
        sentence="the collated batch trains what the ledger says, ends of turn included",
        prove=label_check.trained_text_is_the_ledgers,
        cause="the mask is dropped or the answers are masked out, the pad token stands for the end of turn, or data/train is not the "
        "ledger's",
    ),
    Check(
        name="accumulation",
        sentence="accumulated micro-batches make the step of one large batch",
        prove=gradient_checks.accumulation_equals_one_batch,
        cause="the loss of a micro-batch is divided by its own tokens, or by nothing, instead of the tokens of the whole step",
    ),
    Check(
        name="gradients",
        sentence="a gradient reaches every adapter matrix and no base weight",
        prove=gradient_checks.gradient_reaches_adapter_only,
        cause="gradient checkpointing without input gradients, a frozen adapter, or a kernel without a backward pass",
    ),
    Check(
        name="identity",
        sentence="at step 0 the adapter changes nothing",
        prove=gradient_checks.adapter_starts_as_identity,
        cause="B does not start at zero, or the adapter was loaded from elsewhere",
    ),
    Check(
        name="evaluation",
        sentence="an evaluation and a save in between leave gradients, weights and saved bytes as they are",
        prove=gradient_checks.evaluation_leaves_gradients,
        cause="a quantized layer repacked its weights for inference (it needs finetune.quantization.prevent_repacking), or saving quantized them "
        "again",
    ),
    Check(
        name="learning",
        sentence="the loss falls on one batch that is repeated",
        prove=training_checks.loss_falls_on_one_batch,
        cause="optim.learning_rate is far too low, or so high that the loss jumps, or the loss does not reach the adapter",
        only_full=True,
    ),
    Check(
        name="ending",
        sentence="generation stops at the end of turn after an answer that was trained",
        prove=training_checks.answers_end,
        cause="the end of turn is not trained (masked, or taken for the pad token), generation stops at another token than the template's, "
        "or preflight.steps are too few at this learning rate",
        only_full=True,
    ),
    Check(
        name="reload",
        sentence="saved, and loaded by a fresh process, the model has the same logits",
        prove=training_checks.files_hold_the_model,
        cause="saving rounds or drops part of the adapter, or the base in memory is not the one that its files and quantization give",
        only_full=True,
    ),
    Check(
        name="room",
        sentence="evaluation, save and merge fit in memory and on disk",
        prove=memory_check.the_rest_fits,
        cause="merge and evaluation load the dense model, so end here with run.until=train and do them on a machine with more memory; "
        "or the disk is too full: free some, choose another run.root, or keep fewer checkpoints (train.keep_checkpoints)",
    ),
)
