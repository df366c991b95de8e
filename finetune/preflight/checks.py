"""The checks of each level in the order in which they run, with the statement and the likely cause of a failure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetune.objectives import OBJECTIVES
from finetune.preflight import gradient_checks, label_check, memory_check, reward_checks, training_checks
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
        needs_answers: Whether it trains on the answers of the rows.
    """

    name: str
    sentence: str
    run: Callable[[CheckContext], CheckResult]
    cause: str
    only_full: bool = False
    needs_answers: bool = False


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
        needs_answers=True,
    ),
    Check(
        name="accumulation",
        sentence="accumulated micro-batches make the step of one large batch",
        run=gradient_checks.check_accumulation,
        cause="the loss of a micro-batch is divided by its own tokens, or by nothing, instead of the tokens of the "
        "whole step",
        needs_answers=True,
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
        needs_answers=True,
    ),
    Check(
        name="ending",
        sentence="generation stops at the end of turn after a trained answer",
        run=training_checks.check_ending,
        cause="the end of turn is not trained on (masked, or taken for the pad token), generation stops at another "
        "token than the template's, or preflight.steps is too small at this learning rate",
        only_full=True,
        needs_answers=True,
    ),
    Check(
        name="reload",
        sentence="saved and loaded by a fresh process, the model has the same logits",
        run=training_checks.check_reload,
        cause="saving rounds or drops part of the adapter, or the base in memory differs from what its files and "
        "quantization give",
        only_full=True,
        needs_answers=True,
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

REWARD_CHECKS = (
    Check(
        name="sampling",
        sentence="the same seeds sample the same answers",
        run=reward_checks.check_sampling,
        cause="sampling uses the global random state, or all answers of a group have one seed; a resumed run would "
        "sample other answers",
    ),
    Check(
        name="sampler_gap",
        sentence="sampler and trainer give a sampled token the same probability",
        run=reward_checks.check_sampler_gap,
        cause="they differ in temperature, dropout, adapter, padding or positions: the loss would be that of another "
        "policy; kernels=plain rules the kernels out, and train.grpo.temperature=1 the temperature",
    ),
    Check(
        name="reward_errors",
        sentence="the rewards can judge the first answers",
        run=reward_checks.check_reward_errors,
        cause="the reward cannot read the answer or its row: fix it, or take it out of train.grpo.rewards",
    ),
    Check(
        name="reward_repeats",
        sentence="an answer gets the same rewards twice",
        run=reward_checks.check_reward_repeats,
        cause="the reward is random, or depends on time or on earlier answers: make it a function of answer and row",
    ),
    Check(
        name="reward_variance",
        sentence="answers of a group get different rewards",
        run=reward_checks.check_reward_variance,
        cause="the task is too hard or too easy for this model, so equal rewards teach nothing: add a reward with "
        "partial credit (train.grpo.rewards), raise train.grpo.group or temperature, or train on examples first",
    ),
    Check(
        name="divergence",
        sentence="before the first step the policy is the reference",
        run=reward_checks.check_divergence,
        cause="the adapter does not start at zero, or switching it off leaves something on",
    ),
    Check(
        name="cut",
        sentence="answers end before the limit",
        run=reward_checks.check_cut,
        cause="train.grpo.max_new_tokens is too small for this task, or the model does not know when to end: raise it, "
        "ask for short answers in the prompt, or train on examples first",
    ),
    Check(
        name="prompts",
        sentence="prompts are complete",
        run=reward_checks.check_prompts,
        cause="data.max_tokens is too small for the prompts with their references: raise it",
    ),
    Check(
        name="gain",
        sentence="a step makes a rewarded answer more likely",
        run=reward_checks.check_gain,
        cause="the sign of the loss or of the advantages is wrong, or the loss does not read the answer's tokens",
    ),
    Check(
        name="division",
        sentence="answers one by one make the step of one batch",
        run=reward_checks.check_division,
        cause="the loss of a micro-batch is divided by its own answers or tokens instead of those of the whole step",
    ),
)
"""Checks of objectives that sample answers, in addition to those of the model."""


def checks_of(objective: str) -> tuple[Check, ...]:
    """Returns the checks of ``train.objective``."""
    if not OBJECTIVES[objective].samples:
        return CHECKS
    return (*(check for check in CHECKS if not check.needs_answers), *REWARD_CHECKS)
