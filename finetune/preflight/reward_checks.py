"""Checks of objectives that sample answers: the sampler, the rewards, and what the first groups can teach."""

from __future__ import annotations

import json
import math

import torch

from finetune.preflight.context import CheckContext, CheckResult
from finetune.preflight.gradient_checks import ACCUMULATED_BOUND, REGROUPED_BOUND
from finetune.preflight.rollout import RolloutProbe, probe

GAP_BOUND, GAP_SIGNED_BOUND = 0.1, 0.02
"""Nats per token in 16 bits. On a model of 30 layers rounding alone made 0.038 on average, with either sign; another
distribution makes the signed mean, which estimates the sampler's KL divergence to the trainer, differ from 0."""

GAP_FLOAT32_BOUND = 1e-3
"""In float32, for both: rounding made 2e-7 on average; the smallest fault that was planted made 3e-2."""

DIVERGENCE_BOUNDS = {torch.float32: 1e-6}
DIVERGENCE_BOUND = 5e-3
"""The estimate is half of the squared rounding, which is 0.038 nats in 16 bits."""

SMALLEST_LIVE_SHARE = 1 / 8
"""Share of groups whose rewards differ. Below it nearly all of the sampling is wasted."""

LARGEST_CUT_SHARE = 0.9
"""Share of answers cut at the limit, beyond which hardly any complete answer is rewarded."""

ADVISED_CUT_SHARE = 0.25
LARGEST_LOST_SHARE = 0.1
"""Share of prompts that may be shortened or dropped for their length."""

SMALLEST_GAIN, LARGEST_GAIN = 0.25, 4.0
"""Share of the predicted gain in log-probability that one step must reach, and that it may."""


def probed(context: CheckContext) -> RolloutProbe:
    """Returns the answers that all checks share, sampled by the first of them."""
    if context.rollout is None:
        context.rollout = probe(context)
    return context.rollout


def check_sampling(context: CheckContext) -> CheckResult:
    """Samples the first group twice from the same seeds."""
    found = probed(context)
    pairs = list(zip(found.completions, found.again, strict=False))
    different = sum(first.sample.tokens != second.sample.tokens for first, second in pairs)
    same_seed = len({tuple(item.sample.tokens) for item in found.again}) == 1 and len(found.again) > 1
    figure = f"{different} of {len(pairs)} answers differ"
    if same_seed:
        figure += f"; all {len(found.again)} answers of the group are the same"
    return CheckResult(passed=not different and not same_seed, figure=figure, bound="0, and answers that vary")


def check_sampler_gap(context: CheckContext) -> CheckResult:
    """Compares the log-probabilities of sampled tokens under the sampler and under the trainer."""
    gap = probed(context).gap.double()
    mean, signed = float(gap.abs().mean()), float(gap.mean())
    exact = context.dtype == torch.float32
    bounds = (GAP_FLOAT32_BOUND, GAP_FLOAT32_BOUND) if exact else (GAP_BOUND, GAP_SIGNED_BOUND)
    passed = math.isfinite(mean) and mean <= bounds[0] and abs(signed) <= bounds[1]
    figure = f"mean {mean:.2g} nats per token, with its sign {signed:.2g}, largest {float(gap.abs().max()):.2g}"
    return CheckResult(passed=passed, figure=figure, bound=f"mean {bounds[0]:g}, with its sign {bounds[1]:g}")


def check_reward_errors(context: CheckContext) -> CheckResult:
    """Counts the rewards that failed on the sampled answers."""
    errors = probed(context).errors
    figure = "; ".join(f"{name}: {message}" for name, message in errors.items()) or "0 failed"
    return CheckResult(passed=not errors, figure=figure, bound="no errors")


def check_reward_repeats(context: CheckContext) -> CheckResult:
    """Scores the same answers twice."""
    found = probed(context)
    pairs = list(zip(found.completions, found.rewards_again, strict=True))
    differ = sorted({name for item, again in pairs for name in again if item.scores[name] != again[name]})
    count = sum(item.scores != again for item, again in pairs)
    figure = f"{count} of {len(pairs)} answers get another reward" + (f": {', '.join(differ)}" if differ else "")
    return CheckResult(passed=not count, figure=figure, bound="0")


def check_reward_variance(context: CheckContext) -> CheckResult:
    """Counts the groups whose answers have different rewards."""
    groups = probed(context).groups
    live = sum(len(set(group)) > 1 for group in groups)
    rewards = [reward for group in groups for reward in group]
    mean = sum(rewards) / len(rewards)
    figure = f"{live} of {len(groups)} groups, mean reward {mean:.3f}"
    if len(set(rewards)) == 1:
        figure += f", all {len(rewards)} rewards are {rewards[0]:g}"
    return CheckResult(passed=live >= SMALLEST_LIVE_SHARE * len(groups), figure=figure, bound="at least 1 in 8")


def check_divergence(context: CheckContext) -> CheckResult:
    """Compares policy and reference before the first step."""
    value, bound = probed(context).divergence, DIVERGENCE_BOUNDS.get(context.dtype, DIVERGENCE_BOUND)
    return CheckResult(passed=value <= bound, figure=f"{value:.2g} nats per token", bound=f"{bound:g}")


def check_cut(context: CheckContext) -> CheckResult:
    """Counts the answers that reached the limit."""
    found = probed(context)
    share = sum(not item.sample.ended for item in found.completions) / len(found.completions)
    lengths = [len(item.sample.tokens) for item in found.completions]
    figure = f"{share:.0%} cut, mean length {sum(lengths) / len(lengths):.0f} tokens"
    if ADVISED_CUT_SHARE < share <= LARGEST_CUT_SHARE:
        figure += "; a larger train.grpo.max_new_tokens would reward more of them"
    return CheckResult(passed=share <= LARGEST_CUT_SHARE, figure=figure, bound=f"{LARGEST_CUT_SHARE:.0%}")


def check_prompts(context: CheckContext) -> CheckResult:
    """Counts the prompts that data.max_tokens shortened or dropped."""
    rows = context.data.rows
    dropped = rows.get("dropped") or {}
    by_length = sum(count for reason, count in dropped.items() if "longer" in reason)
    lost, total = int(rows.get("truncated") or 0) + by_length, int(rows.get("in") or 0)
    share = lost / total if total else 0.0
    return CheckResult(
        passed=share <= LARGEST_LOST_SHARE,
        figure=f"{lost:,} of {total:,} rows ({share:.0%}); {json.dumps(dropped) if dropped else 'none dropped'}",
        bound=f"{LARGEST_LOST_SHARE:.0%}",
    )


def check_gain(context: CheckContext) -> CheckResult:
    """Takes one step in which a single answer is good, and compares the gain in its log-probability."""
    found = probed(context)
    low, high = SMALLEST_GAIN * found.predicted, LARGEST_GAIN * found.predicted
    return CheckResult(
        passed=low <= found.gained <= high,
        figure=f"{found.gained:+.2f} nats where the gradient predicts {found.predicted:+.2f}",
        bound=f"{low:g} to {high:g}",
    )


def check_division(context: CheckContext) -> CheckResult:
    """Compares the gradient of answers one by one with that of one batch."""
    value = probed(context).divided
    bound = REGROUPED_BOUND if context.device.startswith("cuda") else ACCUMULATED_BOUND
    return CheckResult(passed=value <= bound, figure=f"gradients differ by {value:.1%}", bound=f"{bound:.0%}")
