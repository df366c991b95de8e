"""The verb: runs each proof, prints one line for it, stops the run where one fails."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from finetune.console import say
from finetune.errors import TrainError
from finetune.rehearse.config import Rehearsal, RehearseConfig

if TYPE_CHECKING:
    from finetune.data import PreparedData
    from finetune.hardware import Placement
    from finetune.lora import LoraConfig
    from finetune.model import Base
    from finetune.speed import Quick, SpeedConfig


def rehearse(
    config: RehearseConfig,
    *,
    folder: Path,
    adapted: Any,
    tokenizer: Any,
    data: PreparedData,
    base: Base,
    quantization: dict[str, Any],
    lora: LoraConfig,
    upcast: str,
    placement: Placement,
    quick: Quick,
    speed: SpeedConfig,
    seed: int,
) -> Rehearsal:
    """Proves on the real model and the first real rows that training would train what it should.

    Args:
        config: The rehearse group.
        folder: Receives trained_text.txt.
        adapted: The adapted model, before its first step; left exactly as it was.
        tokenizer: Decodes what is trained.
        data: Prepared rows.
        base: What was adapted; with the next three it decides whether a finished rehearsal still holds.
        quantization: Its specification.
        lora: The adapter's settings.
        upcast: ``model.upcast``.
        placement: Device and numbers.
        quick: How steps are computed; turned off where they give other gradients than plain ones.
        speed: Its settings.
        seed: Seeds the nudge that the gradient proofs give to B.

    Returns:
        The proofs, and what follows: where attention does not keep documents of a row apart, training goes on with a row
        for each; where quick steps give other gradients, with plain ones.

    Raises:
        TrainError: Another proof failed; the message has the figure, the bound and the likely cause.
    """
    if config.level == "off":
        say("rehearse", "off, as set: nothing is proved before training, and the report says so")
        return Rehearsal(folder=folder, proofs=[], isolates=True, quick=True)
    from finetune.rehearse import proofs
    from finetune.rehearse.bench import Bench

    bench = Bench.build(
        adapted, tokenizer=tokenizer, data=data, placement=placement, quick=quick, rows=config.rows, step0_bound=lora.step0_bound, seed=seed
    )
    (folder / "trained_text.txt").write_text("\n\n".join(bench.trained_text()), encoding="utf-8")
    results: list[dict[str, Any]] = []
    for prove in tqdm(proofs.QUICK, desc="rehearse", unit="proof", leave=False):
        started = time.monotonic()
        proof = prove(bench)
        results.append({**proof, "seconds": round(time.monotonic() - started, 2)})
    for proof in results:
        mark = "holds" if proof["passed"] else "FAILS"
        say("rehearse", f"{mark}: {proof['sentence']} ({proof['figure']}; bound {proof['bound']})")
    isolates = all(proof["passed"] for proof in results if proof["name"] == proofs.ISOLATION)
    if not isolates:
        say("rehearse", "each document trains in a row of its own, padded, because this model's attention mixes documents of one row")
    trusted = all(proof["passed"] for proof in results if proof["name"] == proofs.SPEED)
    if not trusted:
        say("rehearse", "steps are computed as transformers and peft do, because the quick ones give other gradients on this model")
    failed = [proof for proof in results if not proof["passed"] and proof["name"] not in (proofs.ISOLATION, proofs.SPEED)]
    if failed:
        lines = "; ".join(
            f"{proof['sentence']}: {proof['figure']}, bound {proof['bound']}. Likely cause: {proof['cause']}" for proof in failed
        )
        raise TrainError(f"rehearse: {len(failed)} of {len(results)} proofs fail, so nothing is trained. {lines}")
    return Rehearsal(folder=folder, proofs=results, isolates=isolates, quick=trusted)
