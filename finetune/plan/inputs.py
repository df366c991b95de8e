"""What memory depends on, as plain numbers, so that the closed form needs neither Hydra nor torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from finetune.architecture import ArchitectureConfig, layer_groups
from finetune.parameters import EXPERTS, Linear, expert_layers, linear_layers

ALL_LINEAR = "all-linear"
FLOAT = 4
GIB = 1024**3
SEGMENT_BYTES, LARGE_BYTES, SMALL_BYTES = 2 * 1024**2, 10 * 1024**2, 1024**2
"""A CUDA tensor of 10 MiB or more gets its own memory in steps of 2 MiB, and the remainder is not used by other large
tensors. Tensors below 1 MiB share segments of 2 MiB.
Source: torch's c10/cuda/CUDACachingAllocator.h, kMinLargeAlloc, kRoundLarge, kSmallSize and kSmallBuffer."""


@dataclass(frozen=True, kw_only=True)
class TrainerMemoryModel:
    """How an implementation of the training step uses memory; the defaults are this project's.

    Attributes:
        logits_bytes: Bytes alive per vocabulary entry and token when the loss is at its peak; 0 where the loss is
            tiled.
        logits_held_bytes: Those of them that stay alive until the whole backward pass is done.
        loss_tile: Tokens and vocabulary entries of one tile of a tiled loss.
        norm_bytes: Bytes that a normalisation keeps per element; RMSNorm computes in float32 and keeps that copy.
        keeps_inputs: A frozen 4-bit layer keeps its input without need: bitsandbytes before 0.43.2, pull request 1270.
        keeps_last_graph: Share of the previous step's kept inputs that are still alive: the loop refers to its loss
            until the next one exists, and those inputs belong to the graph's nodes.
        keeps_qkv: Query, key and value are views of one projection, which therefore stays alive whole.
        one_qkv_branch: Query, key and value share one LoRA branch, whose output is kept when it is scattered into
            theirs.
        repeats_kv: Key and value heads are copied up to the number of query heads before attention.
        quantizes_head: The output head is quantized too.
        unties: Embedding and head are stored separately even where the model ties them.
        embedding_gradient: The embedding is left trainable by mistake, so its whole gradient is made.
        reduced_input_copies: Every LoRA branch casts its own copy of the input (autocast with float32 adapters).
        reenters: Checkpointing is the older, reentrant kind, whose first pass makes no graph at all.
        cuts_all: FSDP shards adapter, embedding and head too, as accelerate's plugin does, not only frozen layer
            weights.
    """

    logits_bytes: int = 0
    logits_held_bytes: int = 0
    loss_tile: tuple[int, int] = (4096, 32768)
    norm_bytes: int = 4
    keeps_inputs: bool = False
    keeps_last_graph: float = 0
    keeps_qkv: bool = False
    one_qkv_branch: bool = False
    repeats_kv: bool = False
    quantizes_head: bool = False
    unties: bool = False
    embedding_gradient: bool = False
    reduced_input_copies: bool = True
    reenters: bool = False
    cuts_all: bool = False


TRL = TrainerMemoryModel()
"""TRL 1.16 with its fused head: trl/kernels/chunked_logprob.py (4,096 tokens) and trl/trainer/utils.py (32,768
entries)."""


@dataclass(frozen=True, kw_only=True)
class KernelChoice:
    """How a step is computed, as `finetune.kernels` chooses it; the defaults are transformers' and peft's own.

    Attributes:
        fused: q, k, v and gate, up are one product each, and keep only what the backward pass needs.
        loss_on_trained_tokens: Head and loss are computed on trained tokens only, a few at a time.
        native: Element-wise operations are compiled, without float32 copies.
        tiles: Attention runs in AMX tiles, which keeps q, k and v as the product wrote them.
        cached: Quantized weights are kept in 16 bit too, dequantized once.
        varlen: Attention is one call for all documents; planned as document by document, which keeps no less.
        flat: All documents of a micro-batch lie in one row.
        documents: Attention runs on each document of that row; otherwise it has a mask of tokens by tokens.
        selective: Checkpointing recomputes only the gated layers.
    """

    fused: bool = False
    loss_on_trained_tokens: bool = False
    native: bool = False
    tiles: bool = False
    cached: bool = False
    varlen: bool = False
    flat: bool = False
    documents: bool = False
    selective: bool = False


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """One training configuration.

    Attributes:
        architecture: The model's dimensions.
        method: ``none``, ``nf4``, ``fp4``, ``int8``, ``torchao_int8``, ``hqq`` or ``prequantized``.
        double: Whether the 4-bit constants are quantized too.
        keep: Linear layers that stay unquantized, as `finetune.quantization.is_skipped` reads them.
        keep_bytes: Bytes that further unquantized layers may take beyond their quantized form.
        bits, group_size: hqq's, and those of a prequantized base; no group size stands for whole rows.
        group_bytes: Bytes of the constants of one group of a prequantized base.
        rank: LoRA rank; 0 trains every weight instead (full fine-tuning).
        targets: Last name segments of adapted layers, or ``all-linear``; ``head`` for the output head.
        experts: Whether experts have adapters, each its own or all of a layer the same: ``lora.experts``.
        routers: Whether routers are trained whole.
        adapter_bytes: Bytes per element of the adapter.
        dropout: Whether LoRA has dropout, which keeps a mask and a copy for each branch.
        compute_bytes: Bytes per element of the computation.
        stored_bytes: Bytes per element of unquantized weights at rest; 4 where they are float32 and cast for each
            product.
        cast_copy: A 16-bit copy of float32 weights stays through a step (autocast).
        upcast: Frozen parts stored in float32: ``none``, ``norms`` or ``all``.
        rows: Micro-batch per process, in rows or packs.
        documents: Sequences in a row: 2 where a row is a pair of answers.
        extra_passes: Forward passes over each row without a gradient, such as those of a reference.
        tokens: Tokens per sequence, padding included.
        step_rows: Rows that one optimizer step reads over all processes; no micro-batch is larger.
        checkpointing: Whether activations are recomputed in the backward pass.
        offload_activations: Whether host memory holds what checkpointing keeps.
        attention: ``fused`` (no score matrix is kept) or ``eager``.
        optimizer: transformers' name.
        strategy: ``single``, ``ddp``, ``fsdp`` or ``zero3``.
        processes: Number of processes, one for each GPU.
        offload: Whether host memory holds the shards.
        accumulates: Whether gradients of earlier micro-batches are alive while a later one is computed.
        device: ``cuda`` or ``cpu``.
        sampled_rows: Answers in one batch that training samples; 0 where it samples none.
        sampled_tokens: Longest of these answers.
        answers: Rows that the eval stage generates answers for.
        answer_rows: Its batch size; 0 where the free memory decides.
        answer_tokens: Longest answer.
        prompt_tokens: Longest prompt.
        measured_rows: Held-out rows that eval and merge measure the loss on.
        measured_tokens: Padded tokens per forward pass of the eval and merge stages.
        needs_base: Whether the eval stage measures the dense base however long that takes.
        kernels: How a step is computed.
        trainer: How the implementation uses memory.
    """

    architecture: ArchitectureConfig
    method: str
    double: bool = False
    keep: tuple[str, ...] = ()
    keep_bytes: int = 0
    bits: int = 4
    group_size: int = 64
    group_bytes: float = 0
    rank: int
    targets: tuple[str, ...] = (ALL_LINEAR,)
    experts: str = "none"
    routers: bool = False
    adapter_bytes: int = 4
    dropout: bool = False
    compute_bytes: int = 2
    stored_bytes: int = 2
    cast_copy: bool = False
    upcast: str = "none"
    rows: int
    documents: int = 1
    extra_passes: int = 0
    tokens: int
    step_rows: int = 64
    checkpointing: bool
    offload_activations: bool = False
    attention: str = "fused"
    optimizer: str = "paged_adamw_8bit"
    strategy: str = "single"
    processes: int = 1
    offload: bool = False
    accumulates: bool = True
    device: str = "cuda"
    sampled_rows: int = 0
    sampled_tokens: int = 0
    answers: int = 0
    answer_rows: int = 0
    answer_tokens: int = 0
    prompt_tokens: int = 0
    measured_rows: int = 0
    measured_tokens: int = 4096
    needs_base: bool = False
    kernels: KernelChoice = KernelChoice()
    trainer: TrainerMemoryModel = TRL

    @property
    def step_tokens(self) -> int:
        """Returns the tokens of one micro-batch of one process."""
        return self.rows * self.documents * self.tokens

    @property
    def shards(self) -> int:
        """Returns the number of shards of the layers' weights."""
        return self.processes if self.strategy in ("fsdp", "zero3") else 1

    @property
    def rest_shards(self) -> int:
        """Returns the number of shards of adapter, gradients, states, embedding and head."""
        return self.shards if self.strategy == "zero3" or self.trainer.cuts_all else 1

    @property
    def packed_4bit(self) -> bool:
        """Tells whether bitsandbytes stores the weights in 4 bits."""
        return self.method in ("nf4", "fp4")

    @property
    def stream_bytes(self) -> int:
        """Returns bytes per element between the layers: float32 where embedding and norms are."""
        return FLOAT if self.upcast == "all" else self.compute_bytes

    @property
    def wide_bytes(self) -> int:
        """Returns bytes per element inside the layers: bitsandbytes keeps the input's dtype, float32 norms widen it."""
        return FLOAT if self.upcast != "none" and self.method != "none" else self.compute_bytes

    @property
    def head_adapted(self) -> bool:
        """Tells whether the output head has an adapter."""
        return "head" in self.targets

    def by_group(self) -> list[PlanInputs]:
        """Returns this configuration for each group of layers that are alike, as a model of these layers alone."""
        groups = layer_groups(self.architecture)
        return [dataclasses.replace(self, architecture=group.architecture) for group in groups]

    def adapts(self, linear: Linear) -> bool:
        """Tells whether a linear layer has an adapter."""
        if linear.parent == EXPERTS:
            return self.rank > 0 and self.experts != "none"
        return self.rank > 0 and (linear.adapted if ALL_LINEAR in self.targets else linear.name in self.targets)

    def split_experts(self) -> list[Linear]:
        """Returns the experts as linear layers, which they are where bitsandbytes stores weights in 4 bits."""
        return expert_layers(self.architecture) if self.packed_4bit else []

    def adapted_layers(self) -> list[Linear]:
        """Returns the linear layers with an adapter, the head included where it has one; shared ones once."""
        a = self.architecture
        layers = [linear for linear in (*linear_layers(a), *self.split_experts()) if self.adapts(linear)]
        if self.experts == "shared":
            layers = [dataclasses.replace(linear, copies=1) for linear in layers]
        if self.rank and self.head_adapted:
            layers.append(Linear(name="head", in_features=a.hidden_size, out_features=a.vocab_size, layers=(a.layers,)))
        return layers


def block_bytes(size: float, inputs: PlanInputs) -> float:
    """Returns the bytes that a tensor of ``size`` bytes takes; torch's CUDA allocator hands out whole segments."""
    if inputs.device != "cuda" or size < LARGE_BYTES:
        return size
    return -(-size // SEGMENT_BYTES) * SEGMENT_BYTES
