"""Computes what evaluation needs besides the weights: batch sizes, and where weights lie that do not fit.

Pure functions without torch: the plan prices with them what eval, merge and export will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from finetune.architecture import DELTA_CHUNK, ArchitectureConfig, layer_groups
from finetune.errors import HardwareError

CHUNK_BYTES = 64 * 1024**2
"""Size of the float32 logits that exist at one time: small compared with any model, large enough for a fast product."""

CHUNK_COPIES = 4
"""Tensors of a chunk's size while it is compared: logits, log-probabilities, the reference's, their difference."""

MOST_ROWS = 128
"""Largest batch of generation: with more rows a step takes as long per row, and a batch lasts as long as its longest
answer."""

USABLE_SHARE = 0.9
"""Share of the free memory that weights and batches may take: allocators need the rest for holes, and other programs
run."""

HOST_BANDWIDTH, DISK_BANDWIDTH = 12e9, 500e6
"""Bytes per second at which offloaded weights are read: from host memory (PCIe 3 x16, or 4 x8), and from a solid-state
disk on SATA."""

LONGEST_READ_SECONDS = 600.0
"""Reading offloaded weights for longer than this is not worth a comparison with the base: a choice, ten minutes."""

FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class FreeMemory:
    """Bytes that may be used.

    Attributes:
        devices: Of each GPU, or of the CPU.
        host: Of the host; None where the device is the CPU.
    """

    devices: tuple[int, ...]
    host: int | None = None


def usable(free_bytes: int) -> int:
    """Returns the part of free memory that may be used."""
    return int(free_bytes * USABLE_SHARE)


@dataclass(frozen=True, kw_only=True)
class InferenceCost:
    """Bytes that forward passes without gradients need besides the weights.

    Attributes:
        element_bytes: Of the compute dtype.
        cache_token_bytes: Keys and values of one token in all layers, and a copy of one layer's while it grows.
        layer_token_bytes: One token in the layer that is computed, at its widest moment.
        row_bytes: Logits of one row's last position, in the compute dtype and twice in float32.
        fixed_bytes: Logits of a chunk, and a copy of the largest matrix while it is converted.
    """

    element_bytes: int
    cache_token_bytes: int
    layer_token_bytes: int
    row_bytes: int
    fixed_bytes: int

    @classmethod
    def of(cls, dimensions: ArchitectureConfig, *, element_bytes: int) -> InferenceCost:
        """Computes the cost from a model's dimensions."""
        a, c = dimensions, element_bytes
        groups = [group for group, _ in layer_groups(a)]
        keys = [(group.layers, group.kv_heads * group.head_dim) for group in groups if group.mixer == "attention"]
        attention = max(_mixer_width(group) for group in groups)
        feed_forward = 3 * (a.intermediate_size * max(1, a.active_experts) + a.shared_size)
        norm = 2 * FLOAT * a.hidden_size
        return cls(
            element_bytes=c,
            cache_token_bytes=2 * c * (sum(n * key for n, key in keys) + max((key for _, key in keys), default=0)),
            layer_token_bytes=c * (2 * a.hidden_size + max(attention, feed_forward)) + norm,
            row_bytes=a.vocab_size * (c + 2 * FLOAT),
            fixed_bytes=CHUNK_COPIES * CHUNK_BYTES + (2 * a.vocab_size * a.hidden_size if c == FLOAT else 0),
        )

    def pass_bytes(self, tokens: int) -> int:
        """Returns what a forward pass over padded tokens needs, without logits; the mask is that of a single row."""
        return tokens * self.layer_token_bytes + tokens**2 * (1 + self.element_bytes)

    def answer_bytes(self, *, prompt_tokens: int, new_tokens: int) -> int:
        """Returns what one row of a generated batch needs."""
        cache = (prompt_tokens + new_tokens) * self.cache_token_bytes
        return cache + self.pass_bytes(prompt_tokens) + self.row_bytes

    def answer_rows(self, free_bytes: int, *, prompt_tokens: int, new_tokens: int) -> int:
        """Returns the batch size of generation: the largest power of two that fits, 1 at least.

        Args:
            free_bytes: Usable memory besides the weights.
            prompt_tokens: Of the batch's longest prompt.
            new_tokens: Longest answer.
        """
        row = self.answer_bytes(prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        fitting = max(1, min(MOST_ROWS, (free_bytes - self.fixed_bytes) // row))
        return 1 << (int(fitting).bit_length() - 1)


def answer_batches(lengths: Sequence[int], rows_of: Callable[[int], int]) -> Iterator[list[int]]:
    """Groups prompts of similar length, longest first: the memory peak comes first, and padding is small.

    Args:
        lengths: Tokens of each prompt.
        rows_of: Returns the batch size for a longest prompt.

    Yields:
        Indices into ``lengths``, one list per batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    while order:
        rows = rows_of(lengths[order[0]])
        yield order[:rows]
        order = order[rows:]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one artifact is asked.

    Attributes:
        pass_tokens: Padded tokens of the largest forward pass over given text.
        passes: Number of these passes.
        rows: Answers to generate.
        prompt_tokens: Of the longest prompt.
        new_tokens: Longest answer.
        batch_rows: Batch size of generation; None chooses it.
    """

    pass_tokens: int
    passes: int
    rows: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    batch_rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class WeightPlacement:
    """Where the weights of one artifact lie while it is measured.

    Attributes:
        max_memory: Bytes of weights by GPU index, and by ``cpu``; the rest stays on disk. transformers takes it under
            this name. Empty: all weights are on the run's own device.
        host_bytes: Weights in host memory that are copied to a GPU for each pass.
        disk_bytes: Weights that are read from disk for each pass.
        working_bytes: Needed besides the weights.
        answer_rows: Batch size of generation; 0 without answers.
        passes: Forward passes through the whole model.
    """

    max_memory: dict[int | str, int] = field(default_factory=dict)
    host_bytes: int = 0
    disk_bytes: int = 0
    working_bytes: int
    answer_rows: int
    passes: int

    @property
    def offloaded_bytes(self) -> int:
        """Returns the bytes that are read again for each pass."""
        return self.host_bytes + self.disk_bytes

    @property
    def read_seconds(self) -> float:
        """Returns how long reading offloaded weights takes, over all passes."""
        return self.passes * (self.host_bytes / HOST_BANDWIDTH + self.disk_bytes / DISK_BANDWIDTH)


def place_weights(weight_bytes: int, *, cost: InferenceCost, workload: Workload, free: FreeMemory) -> WeightPlacement:
    """Decides where weights lie: on the first device, on all devices, or partly in host memory and on disk.

    Where they do not fit, a larger batch of answers leaves less memory for weights and reads the others less often;
    the batch size is the one that reads least.

    Args:
        weight_bytes: Of all weights, in the dtype that they are computed in.
        cost: Of the model.
        workload: What will be computed.
        free: Memory before the weights are loaded.

    Raises:
        HardwareError: One row does not fit, even without weights.
    """
    placements = [
        placement
        for rows in _row_counts(workload)
        if (placement := _placed(weight_bytes, rows, cost=cost, workload=workload, free=free)) is not None
    ]
    if not placements:
        raise HardwareError(
            f"one row of {max(workload.pass_tokens, workload.prompt_tokens + workload.new_tokens)} tokens needs more "
            f"memory than is free on {'the CPU' if free.host is None else 'the GPU'}; lower data.max_tokens, "
            "eval.batch_tokens or eval.max_new_tokens"
        )
    if workload.batch_rows:
        return placements[0]
    return min(placements, key=lambda placement: (placement.read_seconds, -placement.answer_rows))


def _row_counts(workload: Workload) -> list[int]:
    """Returns the batch sizes to try, the largest first; one that was set may be too large."""
    if not workload.rows:
        return [0]
    rows = min(workload.rows, workload.batch_rows or MOST_ROWS)
    return sorted({rows, *(1 << power for power in range(rows.bit_length()))}, reverse=True)


def _placed(
    weight_bytes: int, rows: int, *, cost: InferenceCost, workload: Workload, free: FreeMemory
) -> WeightPlacement | None:
    answers = rows * cost.answer_bytes(prompt_tokens=workload.prompt_tokens, new_tokens=workload.new_tokens)
    working = cost.fixed_bytes + max(cost.pass_bytes(workload.pass_tokens), answers)
    batches = -(-workload.rows // rows) if rows else 0
    passes = workload.passes + batches * workload.new_tokens
    first, *others = (usable(size) - working for size in free.devices)
    if first < 0:
        return None
    if weight_bytes <= first:
        return WeightPlacement(working_bytes=working, answer_rows=rows, passes=passes)
    places: dict[int | str, int] = {"cpu": first}
    rest, host = weight_bytes - first, 0
    if free.host is not None:
        gpus = [first, *(max(0, size) for size in others)]
        rest = max(0, weight_bytes - sum(gpus))
        places = {**dict(enumerate(gpus)), "cpu": usable(free.host)}
        host = min(rest, places["cpu"])
    return WeightPlacement(
        max_memory=places,
        host_bytes=host,
        disk_bytes=rest - host,
        working_bytes=working,
        answer_rows=rows,
        passes=passes,
    )


def _mixer_width(a: ArchitectureConfig) -> int:
    """Returns the elements of one token between the linear layers that mix tokens, of layers that are all alike."""
    if a.mixer == "convolution":
        return 6 * a.hidden_size
    if a.mixer == "linear":  # the gated delta rule in float32: ten tensors of the values' width, three of pairs
        channels = (2 * a.linear_key_heads + a.linear_value_heads) * a.linear_head_dim
        return 2 * channels + 2 * a.linear_value_heads * (10 * a.linear_head_dim + 3 * DELTA_CHUNK)
    return 2 * a.heads * a.head_dim + 2 * a.kv_heads * a.head_dim + a.hidden_size
