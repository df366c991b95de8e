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


def rehearse(
    config: RehearseConfig,
    *,
    folder: Path,
    adapted: Any,
    tokenizer: Any,
    data: PreparedData,
    packing: bool,
    base: Base,
    quantization: dict[str, Any],
    lora: LoraConfig,
    upcast: str,
    placement: Placement,
    seed: int,
) -> Rehearsal:
    """Proves on the real model and the first real rows that training would train what it should.

    Args:
        config: The rehearse group.
        folder: Receives trained_text.txt.
        adapted: The adapted model, before its first step; left exactly as it was.
        tokenizer: Decodes what is trained.
        data: Prepared rows.
        packing: Whether they share training rows.
        base: What was adapted; with the next three it decides whether a finished rehearsal still holds.
        quantization: Its specification.
        lora: The adapter's settings.
        upcast: ``model.upcast``.
        placement: Device and numbers.
        seed: Seeds the nudge that the gradient proofs give to B.

    Raises:
        TrainError: A proof failed; the message has the figure, the bound and the likely cause.
    """
    if config.level == "off":
        say("rehearse", "off, as set: nothing is proved before training, and the report says so")
        return Rehearsal(folder=folder, proofs=[])
    from finetune.rehearse import proofs
    from finetune.rehearse.bench import Bench

    bench = Bench.build(adapted, tokenizer=tokenizer, data=data, packing=packing, placement=placement, rows=config.rows, seed=seed)
    (folder / "trained_text.txt").write_text("\n\n".join(bench.trained_text()), encoding="utf-8")
    results: list[dict[str, Any]] = []
    for prove in tqdm(proofs.QUICK, desc="rehearse", unit="proof", leave=False):
        started = time.monotonic()
        proof = prove(bench)
        results.append({**proof, "seconds": round(time.monotonic() - started, 2)})
    for proof in results:
        mark = "holds" if proof["passed"] else "FAILS"
        say("rehearse", f"{mark}: {proof['sentence']} ({proof['figure']}; bound {proof['bound']})")
    failed = [proof for proof in results if not proof["passed"]]
    if failed:
        lines = "; ".join(
            f"{proof['sentence']}: {proof['figure']}, bound {proof['bound']}. Likely cause: {proof['cause']}" for proof in failed
        )
        raise TrainError(f"rehearse: {len(failed)} of {len(results)} proofs fail, so nothing is trained. {lines}")
    return Rehearsal(folder=folder, proofs=results)
