"""Shards a frozen base over processes with torch's FSDP2; each layer's shards are gathered while it computes.

Only the layers' frozen weights are sharded. The adapter stays whole everywhere, and its gradients are summed in float32
as under DDP; embedding, last norm and head stay whole because both ends of a step use them. FSDP's own mixed precision
is not used: it would sum gradients in bfloat16. So a step computes what DDP computes, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.console import human_bytes, log
from finetune.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FSDP_PREVENTS_FUSION = "launch=fsdp gathers a layer's weights in the layer's own forward pass"
"""Why layers are not fused: fused layers hold weights, or copies of them, of their own."""


def shard_base_model(adapted: PeftModel, *, processes: int, device: str, offload: bool) -> None:
    """Shards the base in place. Every process must call it, after the process group was created.

    Args:
        adapted: The whole model, in host memory or on its device.
        processes: Number of shards.
        device: Where the shards are placed and gathered: ``cpu`` or ``cuda``.
        offload: Whether shards that are not in use are kept in host memory.

    Raises:
        ModelError: The model has no list of layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    causal: Any = adapted.get_base_model()
    decoder = causal.get_decoder()
    layers = list(getattr(decoder, "layers", ()))
    if not layers:
        raise ModelError(
            f"launch=fsdp shards a model layer by layer, and {type(decoder).__name__} has no list of layers; "
            "use launch=ddp"
        )
    sharded = {parameter for layer in layers for parameter in layer.parameters() if not parameter.requires_grad}
    whole = {parameter for parameter in adapted.parameters() if parameter not in sharded}
    size = sum(parameter.numel() * parameter.element_size() for parameter in sharded)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device, (processes,))
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for module in (*layers, decoder):  # the decoder has nothing left to shard; as their root it lets layers prefetch
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole, offload_policy=policy)
    for model in (adapted, causal):
        vars(model).pop("hf_device_map", None)  # where the model was loaded; peft would move it back there
    where = ", in host memory while not in use" if offload else ""
    log(
        "launch",
        f"the base's layers, {human_bytes(size)}, are split into {processes} shards{where}; "
        "embedding, head and adapter are not",
    )


def join_collectives(model: PreTrainedModel, *, passes: int) -> None:
    """Runs forward passes on a dummy token: while other processes compute a layer, this one must provide its shards.

    Args:
        model: From `shard_base_model`.
        passes: How many more passes another process makes.
    """
    import torch

    decoder: Any = model.get_decoder()
    dummy = torch.zeros((1, 1), dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        for _ in range(passes):
            decoder(input_ids=dummy, use_cache=False)
