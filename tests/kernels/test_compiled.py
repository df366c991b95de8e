"""Kernels that torch compiles are held to plain torch, in the same words for CPU and GPU.

The fast tests let torch trace and differ in nothing but the last step, in which Inductor writes C++ or Triton; the slow
one has it write and compile C++.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from finetune.kernels import compiled, plain
from finetune.kernels.forms import ACTIVATIONS, OFFSET, ROUNDED, WIDE
from tests.kernels.helpers import BOUNDS, GROUPED, adapt, base, batch, fuse, fused_and_plain

SILU, GELU = ACTIVATIONS["SiLU"], ACTIVATIONS["GELUTanh"]
Results = list[Tensor]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Counts what torch traces; its programs are run as they are traced."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    with anew():
        yield counter


class anew:
    """Compiles again within the context, and forgets it after."""

    def __enter__(self) -> None:
        self._forget()

    def __exit__(self, *_: object) -> None:
        self._forget()

    def _forget(self) -> None:
        torch._dynamo.reset()
        compiled._compiled.cache_clear()
        compiled.obstacle.cache_clear()


def norms(kernels: Any, rows: int, dtype: torch.dtype) -> Results:
    found = []
    for form in (ROUNDED, WIDE, OFFSET):
        x, dy, weight = random(2, rows, 64, dtype=dtype), random(2, rows, 64, dtype=dtype), random(64, dtype=dtype)
        y, rstd = kernels.rms_forward(x, weight, 1e-5, form)
        found += [y, rstd, kernels.rms_backward(dy, x, weight, rstd, form)]
    return found


def gates(kernels: Any, rows: int, dtype: torch.dtype) -> Results:
    both, dy = random(rows, 96, dtype=dtype), random(rows, 48, dtype=dtype)
    return [
        result
        for form in (SILU, GELU)
        for result in (kernels.gated_forward(both, form), kernels.gated_backward(dy, both, form))
    ]


def losses(kernels: Any, rows: int, dtype: torch.dtype) -> Results:
    logits, targets = random(rows, 300, dtype=dtype), torch.arange(rows) % 300
    return [kernels.cross_entropy(logits, targets), logits]  # replaced by their gradient


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).mul_(3.0).to(dtype)


def assert_equal(functions: Callable[[Any, int, torch.dtype], Results], rows: int, dtype: torch.dtype) -> None:
    units = 1e-5 if dtype == torch.float32 else 2.0**-6
    for found, expected in zip(functions(compiled, rows, dtype), functions(plain, rows, dtype), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found.float(), expected.float(), rtol=units, atol=units / 10)


@pytest.mark.parametrize("functions", [norms, gates, losses])
def test_one_program_serves_every_number_of_rows(functions: Any, programs: Any) -> None:
    assert_equal(functions, 5, torch.float32)
    traced = programs.frame_count
    assert traced
    for rows in (2, 9, 512):
        assert_equal(functions, rows, torch.float32)
    assert programs.frame_count == traced


def test_every_width_of_a_model_has_its_program(programs: Any) -> None:
    for width in range(8, 8 * 20, 8):  # more than torch's own limit
        x, weight = random(3, width, dtype=torch.float32), random(width, dtype=torch.float32)
        assert compiled.rms_forward(x, weight, 1e-5, ROUNDED)[0].shape == x.shape
    assert programs.frame_count == 19


def test_a_step_of_a_model_is_the_plain_one(programs: Any) -> None:
    model = adapt(base("Llama", dtype="float32", **GROUPED))
    fusion = fuse(model, dtype="float32", implementation="compiled")
    assert fusion.kernels is compiled
    _, _, distance = fused_and_plain(model, fusion, batch())
    assert programs.frame_count
    assert distance <= BOUNDS["float32"]


def test_what_torch_cannot_compile_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("there is no compiler\nand more")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    with anew():
        assert "torch cannot compile here: " in str(compiled.obstacle("cpu"))
        model = adapt(base("Llama", dtype="float32", **GROUPED))
        assert fuse(model, dtype="float32").kernels is plain


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("functions", [norms, gates, losses])
def test_what_the_compiler_writes_computes_the_same(functions: Any, dtype: torch.dtype) -> None:
    with anew():
        assert compiled.obstacle("cpu") is None
        assert_equal(functions, 7, dtype)
        assert_equal(functions, 64, dtype)
