"""Measures where the time of a training step goes, by kind, on the quickstart's model and some rows.

    python scripts/profile_step.py ROWS.jsonl [tokens] [key=value ...]

ROWS.jsonl holds ``question`` and ``answer``. Overrides such as kernels=plain profile another implementation.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from finetune import hardware, lora
from finetune.bench.speed import write_rows
from finetune.config import load
from finetune.data import prepare
from finetune.inference.collate import Collator
from finetune.inference.rows import read_rows
from finetune.kernels import apply_fusion, native
from finetune.model import ModelSpec

STEPS = 4
KINDS = {
    "attention": ("kind: attention", "scaled_dot_product", "flash_attention"),
    "loss": ("kind: loss", "log_softmax", "nll_loss", "cross_entropy", "logsumexp"),
    "elementwise": ("kind: elementwise",),
    "optimizer": ("kind: optimizer",),
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "mkldnn"),
    "dequantization": ("dequantize", "bitsandbytes"),
    "copies": (
        "aten::copy_",
        "aten::cat",
        "aten::fill_",
        "aten::zero_",
        "aten::empty",
        "aten::index",
        "aten::contiguous",
    ),
    "other elementwise": (
        "aten::add",
        "aten::mul",
        "aten::silu",
        "aten::pow",
        "aten::mean",
        "aten::neg",
        "aten::sum",
        "aten::div",
    ),
}
NATIVE = {
    "attention": ("attention_forward", "attention_backward"),
    "loss": ("cross_entropy",),
    "elementwise": ("rms_forward", "rms_backward", "gated_forward", "gated_backward"),
}


def main() -> None:
    source, rest = Path(sys.argv[1]), sys.argv[2:]
    tokens = int(rest.pop(0)) if rest and rest[0].isdigit() else 2048
    config = load(
        ["+experiment=quickstart", "data=custom", "data.path=-", "data.heldout_share=0", "data.max_tokens=1024", *rest]
    )
    with tempfile.TemporaryDirectory() as place:
        write_rows(source, Path(place), 64)
        config.data.path = f"{place}/trl/train.jsonl"
        step, batch_tokens = build(config, Path(place), tokens)
    for name, functions in NATIVE.items():
        for function in functions:
            setattr(native, function, named(f"kind: {name}", getattr(native, function)))
    step()
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    seconds = (time.perf_counter() - started) / STEPS
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    report(profiler, batch_tokens, seconds)


def build(config: Any, folder: Path, tokens: int) -> tuple[Callable[[], None], int]:
    """Builds a function that does one whole optimizer step, and counts its tokens."""
    placement = hardware.place(hardware.probe(config.hardware), config)
    torch.set_num_threads(placement.threads)
    spec = ModelSpec.resolve(config, placement)
    tokenizer = spec.load_tokenizer()
    data = prepare(config.data, folder=folder / "data", tokenizer=tokenizer, seed=1)
    rows = read_rows(data.folder / "train", limit=max(1, tokens // 1024))
    loaded = spec.load()
    checkpointing = config.train.checkpointing
    adapted = lora.attach(
        loaded, config.lora, upcast=config.model.upcast, checkpointing=checkpointing == "full", seed=1
    )
    kernels = apply_fusion(adapted, config.kernels, placement=placement, checkpointing=checkpointing)
    batch = Collator(flat=True, pad_token_id=tokenizer.pad_token_id)(rows)
    count = batch["input_ids"].numel() - batch.pop("padding")
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=config.optim.learning_rate)
    adapted.train()

    def step() -> None:
        if kernels.loss_on_trained_tokens:
            loss = kernels.loss(adapted, batch) / count
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kernels.autocast):
                loss = adapted(
                    **{key: value for key, value in batch.items() if not key.startswith("max_length")}, use_cache=False
                ).loss
        loss.backward()
        with record_function("kind: optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    return step, count


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def inner(*arguments: Any, **settings: Any) -> Any:
        with record_function(name):
            return function(*arguments, **settings)

    return inner


def report(profiler: profile, tokens: int, seconds: float) -> None:
    shares: Counter[str] = Counter()
    optimizer = next((event.cpu_time_total for event in profiler.key_averages() if event.key == "kind: optimizer"), 0)
    for event in profiler.key_averages():
        kind = next(
            (kind for kind, names in KINDS.items() if any(name in event.key for name in names)), "Python and the rest"
        )
        shares[kind] += optimizer if kind == "optimizer" else event.self_cpu_time_total
    total = sum(shares.values())
    print(f"{tokens} tokens in {seconds * 1e3:.0f} ms: {tokens / seconds:.0f} tokens/s")
    for kind, share in shares.most_common():
        print(f"  {kind:22} {share / total:6.1%}")
    print(
        json.dumps(
            {
                "tokens_per_second": round(tokens / seconds, 1),
                **{kind: round(share / total, 3) for kind, share in shares.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
