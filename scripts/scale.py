"""Computes what processes send each other in a step, and how long that takes on a given link.

    python scripts/scale.py link=25 [price=2.5] [tokens=52e6] +experiment=llama70b_qlora_fsdp hardware=8xa100_80gb \\
        launch.processes=8 ...

link: GB/s that one GPU sends and receives, on the slowest connection. price: of a GPU hour, in any currency. tokens: to
train on. Prints one line per strategy: memory and verdict by the plan, bytes by the formulas below, and seconds without
overlap.
"""

import dataclasses
import sys

from finetune.config import load
from finetune.console import human_bytes, table
from finetune.hardware import Machine, probe
from finetune.plan import phases, weights
from finetune.plan.inputs import PlanInputs
from finetune.plan.product import device_memory
from finetune.plan.settings import from_config
from finetune.plan.throughput import UTILISATION, busy_share, stated_figures, token_operations

HEADS = [
    "strategy",
    "fits",
    "each GPU",
    "sends a step",
    "of it gradients",
    "computes",
    "sends",
    "tokens/s",
    "hours",
    "price",
]


def main() -> None:
    options = dict(word.split("=", 1) for word in sys.argv[1:] if word.partition("=")[0] in ("link", "price", "tokens"))
    config = load([word for word in sys.argv[1:] if word.partition("=")[0] not in options])
    machine = probe(config.hardware)
    inputs = from_config(config, machine)
    if "link" not in options or inputs.processes < 2:
        sys.exit("scale: give link=<GB/s>, and launch.processes of 2 or more")
    link, tokens = float(options["link"]) * 1e9, float(options.get("tokens", "1e6"))
    price = float(options["price"]) if "price" in options else None
    print(
        f"{inputs.processes} x {machine.gpus[0].name}, {inputs.rows} x {inputs.tokens} tokens per micro-batch, "
        f"{inputs.step_rows} rows per step, adapter of {weights.trainable_parameters(inputs):,} parameters, "
        f"link {options['link']} GB/s, {tokens:,.0f} tokens"
    )
    kinds = [("ddp", False), ("fsdp", False), ("fsdp", True)]
    table(
        "scale",
        HEADS,
        [row(dataclasses.replace(inputs, strategy=s, offload=o), machine, link, tokens, price) for s, o in kinds],
    )


def row(inputs: PlanInputs, machine: Machine, link: float, tokens: float, price: float | None) -> list[str]:
    """Computes the row of one strategy."""
    peak, memory = phases.peak(inputs), device_memory(inputs, machine)
    gradients, shards = gradient_bytes(inputs), shard_bytes(inputs)
    step_tokens = inputs.step_rows * inputs.documents * inputs.tokens
    operations = stated_figures(inputs, machine)[0] * UTILISATION
    alone = dataclasses.replace(inputs, strategy="ddp", offload=False)
    process_tokens = micro_batches(inputs) * inputs.step_tokens  # some idle where a step's rows do not divide evenly
    computing = process_tokens * token_operations(inputs) / operations / busy_share(alone)
    sending = (gradients + shards) / link
    speed = step_tokens / (computing + sending)
    hours = tokens / speed / 3600
    return [
        f"{inputs.strategy}{', offload' if inputs.offload else ''}",
        "yes" if peak <= memory else "no",
        human_bytes(peak),
        human_bytes(gradients + shards),
        human_bytes(gradients),
        f"{computing:.2f} s",
        f"{sending:.2f} s",
        f"{speed:,.0f}",
        f"{hours:,.1f}",
        "-" if price is None else f"{hours * inputs.processes * price:,.0f}",
    ]


def gradient_bytes(inputs: PlanInputs) -> float:
    """Returns the bytes that one process sends to reduce the adapter's float32 gradients, once per step.

    Source: a ring all-reduce sends 2 (n - 1) / n of the message (Patarasuk and Yuan 2009); sharded gradients are
    reduced without a broadcast, and the adapter's shards are gathered for the forward pass, which is the same amount.
    """
    return 2 * (inputs.processes - 1) / inputs.processes * 4 * weights.trainable_parameters(inputs)


def shard_bytes(inputs: PlanInputs) -> float:
    """Returns the bytes of frozen weights that one process receives in a step: all layers of the others, per pass.

    Source: FSDP's full sharding gathers a layer for the forward pass and again for the backward pass (PyTorch FSDP,
    arXiv 2304.11277, section 3.2); checkpointing recomputes inside the backward pass, on what is gathered for it.
    """
    if inputs.strategy == "ddp":
        return 0.0
    frozen = weights.weight_bytes(dataclasses.replace(inputs, strategy="ddp", offload=False))
    others = 1.0 if inputs.offload else (inputs.processes - 1) / inputs.processes  # host memory sends all shards
    return 2 * micro_batches(inputs) * (frozen.codes + frozen.unquantized) * others


def micro_batches(inputs: PlanInputs) -> int:
    """Returns the number of micro-batches of one process in one step."""
    return -(-inputs.step_rows // (inputs.rows * inputs.processes))


if __name__ == "__main__":
    main()
