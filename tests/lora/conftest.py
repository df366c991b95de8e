"""A base with weights large enough to matter, and documents to look at."""

import pytest
import torch


@pytest.fixture(scope="session")
def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 500, (length,), generator=generator).tolist() for length in (40, 31, 52, 28)]
