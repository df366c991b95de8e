"""Loads the graph that was trained: the quantized base, prepared as for training, with the saved adapter on it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel

    from finetune.model import ModelSpec

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def load_adapted_model(spec: ModelSpec, adapter: Path, *, max_memory: dict[int | str, int] | None = None) -> PeftModel:
    """Loads the base and a saved adapter as one model in evaluation mode, without gradients: the graph that was
    trained.

    Args:
        spec: The base and how it is loaded.
        adapter: The peft folder.
        max_memory: Bytes of weights by GPU index; empty loads all onto the run's device.

    Raises:
        ModelError: The adapter is incomplete, or belongs to another model.
    """
    check_adapter(adapter)
    return load_adapter(spec.load(max_memory=max_memory), adapter, upcast=spec.config.upcast)


def check_adapter(folder: Path, *, setting: str = "") -> None:
    """Checks that both files of a peft adapter exist.

    Args:
        folder: Of the adapter.
        setting: The setting that named it, for the message.

    Raises:
        ModelError: A file is missing.
    """
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        where = f"{setting}: {folder}" if setting else str(folder)
        raise ModelError(
            f"{where} is not an adapter: {' and '.join(missing)} missing; train first, or name a folder that peft wrote"
        )


def load_adapter(model: Any, folder: Path, *, upcast: str) -> Any:
    """Loads a saved adapter onto a base, in the dtype that it was saved in.

    By default, peft either casts a bfloat16 adapter to float32, or rounds a float32 one to the base's bfloat16;
    training computed in the saved dtype.

    Raises:
        ModelError: Names or shapes of the adapter do not fit this base.
    """
    from peft import PeftModel

    from finetune.lora import prepare_for_training
    from finetune.lora.experts import prepare_base_for, round_routers
    from finetune.quantization.qat import round_sums

    prepare_base_for(model, folder)
    prepare_for_training(model, upcast=upcast, checkpointing=False)
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"{folder} does not fit this base: {str(error).splitlines()[0]}; give the base that it was trained on"
        ) from error
    _restore_saved_tensors(adapted, folder / ADAPTER_FILES[1])
    round_routers(adapted)
    round_sums(adapted)
    adapted.requires_grad_(False)
    return adapted.eval()


def add_adapter(model: Any, folder: Path, *, name: str) -> None:
    """Loads another saved adapter next to those of a model, inactive, in the dtype that it was saved in.

    Args:
        model: From `load_adapter`.
        folder: Of the adapter.
        name: Of peft's ``set_adapter``.

    Raises:
        ModelError: Names or shapes of the adapter do not fit this base, which has none of it then.
    """
    from finetune.lora.experts import prepare_base_for, round_routers
    from finetune.quantization.qat import round_sums

    check_adapter(folder)
    prepare_base_for(model, folder)
    device = str(next(model.parameters()).device)
    try:
        model.load_adapter(str(folder), name, is_trainable=False, torch_device=device)
    except (ValueError, RuntimeError, KeyError) as error:
        if name in model.peft_config:
            model.delete_adapter(name)
        raise ModelError(f"{folder} does not fit this base: {str(error).splitlines()[0]}") from error
    _restore_saved_tensors(model, folder / ADAPTER_FILES[1], name=name)
    round_routers(model)
    round_sums(model)
    model.requires_grad_(False)


def _restore_saved_tensors(model: Any, file: Path, *, name: str = "default") -> None:
    """Replaces each parameter of an adapter by the saved tensor."""
    from safetensors.torch import load_file

    saved = load_file(file)
    for path, parameter in model.named_parameters():
        if f".{name}" not in path:
            continue
        key = path.replace(f".modules_to_save.{name}", "").replace(f".{name}", "")
        tensor = saved.get(key)
        if tensor is not None and tensor.shape == parameter.shape:
            parameter.data = tensor.to(parameter.device)


def free_memory() -> None:
    """Returns memory to the system after the last reference to a model was deleted, on the GPU too."""
    import torch

    gc.unfreeze()  # a run freezes what exists when it starts
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
