"""A frozen base cut into parts, one for each process, which fetch a layer's other parts while it computes: torch's FSDP2.

Only the layers' frozen weights are cut. The adapter stays whole everywhere, and its gradients are added up as under DDP, in
float32; embedding, last norm and head stay whole because they work at both ends of a step, for which FSDP would fetch them whole.
FSDP's own mixed precision is left out: it would add gradients up in bfloat16. So a step computes what DDP computes, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.console import human_bytes, log
from finetune.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

PLAIN = "launch=fsdp cuts the weights, and a layer's own forward pass is what fetches them"
"""Why layers are not fused: fused ones keep weights, or copies of them, of their own."""


def shard(adapted: Any, *, processes: int, device: str, offload: bool) -> None:
    """Cuts the base in place; to be called by every process, when the process group is there.

    Args:
        adapted: The adapted model, whole, in host memory or on its device.
        processes: Parts.
        device: Where the parts go, and where they come together: ``cpu`` or ``cuda``.
        offload: Parts that are not in use wait in the host's memory.

    Raises:
        ModelError: The model has no list of layers to cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    causal = adapted.get_base_model()
    decoder = causal.get_decoder()
    layers = list(getattr(decoder, "layers", ()))
    if not layers:
        raise ModelError(
            f"launch=fsdp cuts a model layer by layer, and {type(decoder).__name__} has no list of layers; use launch=ddp"
        )
    cut = {parameter for layer in layers for parameter in layer.parameters() if not parameter.requires_grad}
    whole = {parameter for parameter in adapted.parameters() if parameter not in cut}
    size = sum(parameter.numel() * parameter.element_size() for parameter in cut)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device, (processes,))
    for module in (
        *layers,
        decoder,
    ):  # the decoder has nothing left to cut; as their root it lets the layers fetch ahead
        fully_shard(
            module, mesh=mesh, reshard_after_forward=True, ignored_params=whole,
            offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
        )  # fmt: skip
    for model in (adapted, causal):
        vars(model).pop("hf_device_map", None)  # where the model was loaded; peft would put it back there
    where = ", in host memory while not in use" if offload else ""
    log(
        "launch",
        f"the base's layers, {human_bytes(size)}, are cut into {processes} parts{where}; embedding, head and adapter are not",
    )


def join_collectives(model: nn.Module, *, passes: int) -> None:
    """Forward passes of nothing: while another process computes a layer, this one must hand out its part of it.

    Args:
        model: As `shard` left it.
        passes: How many more another process makes.
    """
    import torch

    decoder: Any = model.get_decoder()  # type: ignore[operator]
    nothing = torch.zeros((1, 1), dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        for _ in range(passes):
            decoder(input_ids=nothing, use_cache=False)
