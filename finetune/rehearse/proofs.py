"""Each proof takes the bench and returns its figure, its bound and the likely cause of a failure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from finetune.rehearse.bench import Bench

ISOLATION = "packing"
"""The proof whose failure changes the layout of the rows instead of stopping the run."""

SPEED = "speed"
"""The proof whose failure turns quick steps off instead of stopping the run."""

QUICK_SHARE = 0.1
"""Two orders of rounding in bfloat16 (8 bits, some hundred operations deep) lie 2 to 5 % apart on models of 2 to 30 layers;
a forgotten term or mask is beyond 30 %."""

REPEATS = 3
PACKED_SHARE = 0.25
"""Share of a contamination's effect that rounding may take. bfloat16 keeps 8 bits, so it is seen between 1 and 10 %."""


def trained_text_ends(bench: Bench) -> dict[str, Any]:
    """Every document trains an answer, and the answer's end."""
    ends = {bench.tokenizer.eos_token_id}
    generation = getattr(bench.model, "generation_config", None)
    declared = getattr(generation, "eos_token_id", None)
    ends |= set(declared) if isinstance(declared, list) else {declared}
    vocabulary = bench.tokenizer.get_vocab()
    ends |= {vocabulary[token] for token in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>") if token in vocabulary}
    last = [next((label for label in reversed(row["labels"]) if label != -100), None) for row in bench.documents]
    tail = [[label for label in row["labels"] if label != -100][-2:] for row in bench.documents]
    good = sum(bool(set(tokens) & ends) for tokens in tail)
    first = bench.trained_text()[0]
    return _proof(
        "trained_text",
        passed=good == len(last),
        figure=f"{good} of {len(last)} rows; the first trains {first[:60]!r}",
        bound="all rows",
        sentence="every row trains an answer and the token that ends it",
        cause="the template's end of turn is masked out, or the answer was cut off at data.max_tokens",
    )


def adapter_starts_as_identity(bench: Bench) -> dict[str, Any]:
    """With B at zero the adapted model is the base."""
    difference = smallest(lambda: float((bench.logits(adapter=True) - bench.logits(adapter=False)).abs().max()))
    bound = math.inf if bench.step0_bound is None else bench.step0_bound * float(bench.logits(adapter=False).std())
    return _proof(
        "identity",
        passed=difference <= bound,
        figure=f"largest logit difference {difference:g}",
        bound="none: this variant starts beside the base on purpose" if bench.step0_bound is None else f"{bound:g}",
        sentence="at step 0 the adapter changes nothing",
        cause="B does not start at zero, or the adapter was loaded from elsewhere",
    )


def gradient_reaches_adapter_only(bench: Bench) -> dict[str, Any]:
    """Every A and B gets a gradient that is not zero, and nothing else gets one."""
    with bench.nudged():
        gradients = bench.gradients()
    adapter = [name for name, p in bench.model.named_parameters() if p.requires_grad]
    dead = [name for name in adapter if name not in gradients or not gradients[name].any()]
    stray = [name for name in gradients if "lora_" not in name]
    figure = f"{len(adapter) - len(dead)} of {len(adapter)} matrices, {len(stray)} base weights"
    return _proof(
        "gradients",
        passed=not dead and not stray,
        figure=figure + (f"; without: {', '.join((dead + stray)[:3])}" if dead or stray else ""),
        bound="all matrices, 0 base weights",
        sentence="a gradient reaches every adapter matrix and no base weight",
        cause="gradient checkpointing without input gradients, a frozen adapter, or a kernel without a backward pass",
    )


def evaluation_leaves_gradients(bench: Bench) -> dict[str, Any]:
    """bitsandbytes 0.50.2 repacks 4-bit weights at the first evaluation on AVX512-BF16 CPUs and cuts gradients off."""
    with bench.nudged():
        before, weights = bench.gradients(), bench.weights()
        bench.logits(adapter=True)
        changed = sum(not torch.equal(old, new) for old, new in zip(weights, bench.weights(), strict=True))
        difference = smallest(lambda: _largest_difference(before, bench.gradients()))
    return _proof(
        "evaluation",
        passed=difference == 0.0 and not changed,
        figure=f"largest gradient difference {difference:g}, {changed} of {len(weights)} frozen weights changed",
        bound="0",
        sentence="an evaluation in between leaves gradients and weights as they are",
        cause="a quantized layer repacked its weights for inference; it needs finetune.quantization.protect",
    )


def packing_keeps_documents_apart(bench: Bench) -> dict[str, Any]:
    """Documents side by side in one row give the same log-probabilities as alone.

    How much rounding may differ depends on the model, so the difference is measured against the one that reading each
    other would make: the same row as a single long document.
    """
    alone = bench.trained_logprobs(layout="alone")
    packed = float((bench.trained_logprobs(layout="packed") - alone).abs().mean())
    contaminated = float((bench.trained_logprobs(layout="one document") - alone).abs().mean())
    share = packed / max(contaminated, 1e-9)
    return _proof(
        ISOLATION,
        passed=share <= PACKED_SHARE,
        figure=f"mean difference {packed:.2g} nats a token, {share:.1%} of what reading each other would make"
        + ("" if share <= PACKED_SHARE else "; so every document trains in a row of its own"),
        bound=f"{PACKED_SHARE:.0%}",
        sentence="packed documents do not read each other",
        cause="this attention implementation ignores position_ids; model.attention=sdpa heeds them",
    )


def quick_steps_equal_plain_ones(bench: Bench) -> dict[str, Any]:
    """Fused layers, kernels and the loss on trained tokens give the gradient that transformers and peft give."""
    with bench.nudged():
        quick = bench.gradients()
        with bench.quick.off():
            plain = bench.gradients()
    apart = sum(float((quick[name] - plain[name]).square().sum()) for name in plain)
    share = math.sqrt(apart / max(sum(float(grad.square().sum()) for grad in plain.values()), 1e-30))
    return _proof(
        SPEED,
        passed=quick.keys() == plain.keys() and share <= QUICK_SHARE,
        figure=f"gradients {share:.1%} of their length apart" + ("" if share <= QUICK_SHARE else "; so steps are computed the plain way"),
        bound=f"{QUICK_SHARE:.0%}",
        sentence="quick steps give the gradient of plain ones",
        cause="this model computes something that the fused layers leave out; speed=plain does without them",
    )


def smallest(measure: Callable[[], float]) -> float:
    """The smallest of a few repeats, 0 as soon as one gives it.

    A busy CPU's threaded kernels now and then round a pass differently. Two computations that differ never agree to the
    bit, so one exact agreement is the proof, and chance cannot fake it.
    """
    found = math.inf
    for _ in range(REPEATS):
        found = min(found, measure())
        if found == 0.0:
            break
    return found


def _largest_difference(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    if before.keys() != after.keys():
        return math.inf
    return max(float((before[name] - after[name]).abs().max()) for name in before)


def _proof(name: str, *, passed: bool, figure: str, bound: str, sentence: str, cause: str) -> dict[str, Any]:
    return {"name": name, "passed": passed, "figure": figure, "bound": bound, "sentence": sentence, "cause": cause}


QUICK: tuple[Callable[[Bench], dict[str, Any]], ...] = (
    trained_text_ends,
    adapter_starts_as_identity,
    gradient_reaches_adapter_only,
    evaluation_leaves_gradients,
    packing_keeps_documents_apart,
    quick_steps_equal_plain_ones,
)
