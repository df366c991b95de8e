"""A base with weights large enough to matter, and documents to look at."""

import shutil
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def loud_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with layers ten times as large, so that what an adapter does is seen in the logits."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("loud") / "base"
    shutil.copytree(tiny_base, folder)
    tensors = load_file(folder / "model.safetensors")
    loud = {name: (tensor * 10 if "proj" in name else tensor * 4 if "embed" in name else tensor) for name, tensor in tensors.items()}
    save_file(loud, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 500, (length,), generator=generator).tolist() for length in (40, 31, 52, 28)]
