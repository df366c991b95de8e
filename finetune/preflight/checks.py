"""The checks of each level in the order in which they run, with the statement and the likely cause of a failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetune.preflight import gradient_checks, label_check, memory_check, training_checks
from finetune.preflight.context import CheckContext, CheckResult


@dataclass(frozen=True, kw_only=True)
class Check:
    """A statement about the training that is about to start, and the function that checks it.

    Attributes:
        name: Its name in the manifest.
        sentence: The statement.
        run: Compares a figure with its bound; raises `CheckSkipped` where that is not possible.
        cause: The likely cause of a failure.
        only_full: Whether ``preflight=quick`` leaves the check out.
    """

    name: str
    sentence: str
    run: Callable[[CheckContext], CheckResult]
    cause: str
    only_full: bool = False


FUSED_LAYERS = Check(
    name="fused_layers",
    sentence="fused layers give the gradient of the original layers",
    run=gradient_checks.check_fused_layers,
    cause="this model computes something that the fused layers leave out; kernels=plain does not use them",
)
"""Where it fails, fused layers are turned off and the run continues."""

PACKING = Check(
    name="packing",
    sentence="a packed document has the same loss as alone",
    run=gradient_checks.check_packing,
    cause="this attention implementation ignores position_ids; model.attention=sdpa uses them",
)
"""Where it fails, each document gets a row of its own and the run continues."""

CHECKS = (
    FUSED_LAYERS,
    PACKING,
    Check(
        name="trained_text",
        sentence="the collated batch trains on the text that the ledger records, ends of turn included",
        run=label_check.check_trained_text,
        cause="the mask is dropped or the answers are masked out, the pad token is also the end of turn, or data/train "
        "does not belong to the ledger",
    ),
    Check(
        name="accumulation",
        sentence="accumulated micro-batches make the step of one large batch",
        run=gradient_checks.check_accumulation,
        cause="the loss of a micro-batch is divided by its own tokens, or by nothing, instead of the tokens of the "
        "whole step",
    ),
    Check(
        name="gradients",
        sentence="a gradient reaches every adapter matrix and none of the base weights",
        run=gradient_checks.check_gradients,
        cause="gradient checkpointing without input gradients, a frozen adapter, or a kernel without a backward pass",
    ),
    Check(
        name="identity",
        sentence="at step 0 the adapter changes nothing",
        run=gradient_checks.check_identity,
        cause="B does not start at zero, or the adapter was loaded from elsewhere",
    ),
    Check(
        name="evaluation",
        sentence="an evaluation and a save leave gradients, weights and saved bytes unchanged",
        run=gradient_checks.check_evaluation,
        cause="a quantized layer repacked its weights for inference (finetune.quantization.prevent_repacking prevents "
        "it), or saving quantized them again",
    ),
    Check(
        name="learning",
        sentence="the loss falls when one batch is repeated",
        run=training_checks.check_learning,
        cause="optim.learning_rate is far too low, or so high that the loss jumps, or the loss does not reach the "
        "adapter",
        only_full=True,
    ),
    Check(
        name="ending",
        sentence="generation stops at the end of turn after a trained answer",
        run=training_checks.check_ending,
        cause="the end of turn is not trained on (masked, or taken for the pad token), generation stops at another "
        "token than the template's, or preflight.steps is too small at this learning rate",
        only_full=True,
    ),
    Check(
        name="reload",
        sentence="saved and loaded by a fresh process, the model has the same logits",
        run=training_checks.check_reload,
        cause="saving rounds or drops part of the adapter, or the base in memory differs from what its files and "
        "quantization give",
        only_full=True,
    ),
    Check(
        name="memory_and_disk",
        sentence="training fits in memory and on disk",
        run=memory_check.check_memory_and_disk,
        cause="other programs use the device's memory, or the settings need too much: `finetune plan --fit` proposes "
        "some that fit; or the disk is too full: free some space, choose another run.root, or keep fewer checkpoints "
        "(train.keep_checkpoints)",
    ),
)
