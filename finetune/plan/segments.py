"""What tensors take out of a GPU's memory: torch's caching allocator deals in segments."""

from finetune.plan.inputs import PlanInputs

SEGMENT_BYTES = 2 * 1024**2
LARGE_BYTES = 10 * 1024**2
"""A CUDA tensor of 10 MiB or more gets memory of its own in steps of 2 MiB, and what is left over serves no tensor of its kind.
Source: torch's c10/cuda/CUDACachingAllocator.h, kMinLargeAlloc and kRoundLarge."""


def block_bytes(size: float, inputs: PlanInputs) -> float:
    """What a tensor of ``size`` bytes takes."""
    if inputs.device != "cuda" or size < LARGE_BYTES:
        return size
    return -(-size // SEGMENT_BYTES) * SEGMENT_BYTES
