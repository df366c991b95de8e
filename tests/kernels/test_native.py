"""Native kernels are held to plain torch; both take bfloat16 and sum in float32.

The order of a sum moves float32 results by some 1e-6, which carries a value now and then over a border of bfloat16: by
one unit in its last place, at most 2^-7 of it. rms_forward rounds twice, so 2 units there. Nothing else may differ."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune.errors import HardwareError
from finetune.kernels import native, plain
from finetune.kernels.autograd import FusedLinearCrossEntropy
from finetune.kernels.forms import ACTIVATIONS, OFFSET, ROUNDED, WIDE, GateForm, NormForm
from tests.kernels.helpers import GROUPED, adapt, base, fuse

UNIT = 2.0**-7
SILU, GELU = ACTIVATIONS["SiLU"], ACTIVATIONS["GELUTanh"]
SHAPES = [(1, 1), (1, 576), (7, 31), (3, 50), (5, 48), (2, 1536)]
"""Rows and width; few of the widths fill vectors of 16 or 32."""


@pytest.fixture
def compiled() -> None:
    why = native.obstacle()
    assert "could not compile" not in (why or ""), why
    if why:
        pytest.skip(why)
    assert native.library() is not None


def random_bf16(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return (size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).bfloat16()


def assert_close(found: Tensor, expected: Tensor, *, units: float = 1.0, absolute: float = 1e-6) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=units * UNIT, atol=absolute)
    distance = (found != expected).float().mean()
    assert distance <= 0.02 or found.numel() < 100, (
        f"{distance:.1%} of the random_bf16 are rounded in another way: more than chance"
    )


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("form", [ROUNDED, WIDE, OFFSET], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 64)], ids=str)
def test_norm_equals_the_plain_one(shape: tuple[int, ...], form: NormForm) -> None:
    x, weight, dy = random_bf16(*shape, size=3.0), random_bf16(shape[-1], seed=1), random_bf16(*shape, seed=2)
    (y, rstd), (expected, expected_rstd) = (kernels.rms_forward(x, weight, 1e-5, form) for kernels in (native, plain))
    torch.testing.assert_close(rstd, expected_rstd, rtol=1e-6, atol=0.0)
    assert_close(y, expected, units=2.0)
    assert_close(native.rms_backward(dy, x, weight, rstd, form), plain.rms_backward(dy, x, weight, rstd, form))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("form", [SILU, GELU], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_activation_equals_the_plain_one(shape: tuple[int, int], form: GateForm) -> None:
    rows, width = shape
    both, dy = random_bf16(rows, 2 * width, size=3.0), random_bf16(rows, width, seed=1)
    assert_close(native.gated_forward(both, form), plain.gated_forward(both, form))
    assert_close(native.gated_backward(dy, both, form), plain.gated_backward(dy, both, form))


@pytest.mark.parametrize("name", ["SiLU", "GELUTanh"])
def test_plain_gate_is_the_activation_of_transformers_and_its_derivative(name: str) -> None:
    from transformers.activations import ACT2FN

    activation = ACT2FN[{"SiLU": "silu", "GELUTanh": "gelu_pytorch_tanh"}[name]]
    both = torch.cat([torch.linspace(-9.0, 9.0, 64), torch.linspace(-2.0, 3.0, 64)])[None].requires_grad_(True)
    gate, up = both.chunk(2, -1)
    expected, dy = activation(gate) * up, torch.linspace(0.5, 1.5, 64)[None]
    expected.backward(dy)
    assert both.grad is not None
    form = ACTIVATIONS[name]
    torch.testing.assert_close(plain.gated_forward(both.detach(), form), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain.gated_backward(dy, both.detach(), form), both.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("form", [SILU, GELU], ids=str)
@pytest.mark.parametrize("gate", [-3e38, -1000.0, -88.0, -87.0, 0.0, 87.0, 88.0, 1000.0])
def test_gate_far_from_zero_is_open_or_shut(gate: float, form: GateForm) -> None:
    """float32's exp ends at 88; beyond it the gate is 0 or 1 to the last bit that matters."""
    both, dy = torch.tensor([[gate, 2.0]]).bfloat16(), torch.ones(1, 1).bfloat16()
    atol = 1e-30 if gate > -3e38 else 1e3
    assert_close(native.gated_forward(both, form), plain.gated_forward(both, form), absolute=atol)
    mine, expected = (kernels.gated_backward(dy, both, form)[:, :1] for kernels in (native, plain))
    assert_close(mine, expected, absolute=atol)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 49_155), (3, 17), (1, 1), (5, 100), (4, 512)])
def test_cross_entropy_equals_the_plain_one(rows: int, vocabulary: int) -> None:
    logits = random_bf16(rows, vocabulary, size=4.0)
    targets = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(1))
    targets[-1], targets[0] = 0, vocabulary - 1
    mine, expected = logits.clone(), logits.clone()
    losses = native.cross_entropy(mine, targets)
    torch.testing.assert_close(losses, plain.cross_entropy(expected, targets), rtol=1e-5, atol=1e-6)
    assert_close(mine, expected)


@pytest.mark.usefixtures("compiled")
def test_huge_logits_give_a_finite_loss() -> None:
    logits, targets = torch.tensor([[3e4, -3e4, 2e4]] * 3).bfloat16(), torch.tensor([0, 1, 2])
    mine, expected = logits.clone(), logits.clone()
    losses = native.cross_entropy(mine, targets)
    torch.testing.assert_close(losses, plain.cross_entropy(expected, targets), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(mine, expected, rtol=0.0, atol=1e-30)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("place", [0, 15, 16, 31, 99])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_non_finite_logit_makes_the_loss_non_finite(broken: float, place: int) -> None:
    """`Divergence` stops a run by its loss; a maximum or an exp that swallows NaN would hide it."""
    logits = random_bf16(3, 100)
    logits[1, place] = broken
    losses = native.cross_entropy(logits, torch.tensor([5, 6, 7]))
    assert losses.isfinite().tolist() == [True, False, True]
    assert not logits[1].isfinite().all()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_pass_through_norm_and_gate(broken: float) -> None:
    x = random_bf16(3, 50)
    x[1, 20] = broken
    y, _ = native.rms_forward(x, torch.ones(50).bfloat16(), 1e-5, ROUNDED)
    gated = native.gated_forward(x, SILU)
    assert y.isfinite().all(-1).tolist() == [True, False, True]
    assert gated.isfinite().all(-1).tolist() == [True, False, True]


@pytest.mark.usefixtures("compiled")
def test_rounding_goes_to_the_nearest_and_ties_to_even() -> None:
    """From 32 up the sigmoid is 1 in float32, so the gate times up is one product, exact before it is rounded: all 2^14
    are tried."""
    mantissas = 1 + torch.arange(128) / 128
    gate, up = (part.flatten() for part in torch.meshgrid(32 * mantissas, mantissas, indexing="ij"))
    exact = gate.double() * up.double()
    found = native.gated_forward(torch.cat([gate, up])[None].bfloat16(), SILU)[0]
    assert torch.equal(found, exact.float().bfloat16())
    ties = exact.float().view(torch.int32) & 0xFFFF == 0x8000
    assert ties.sum() > 100, "hardly a tie among the products: the test shows nothing"


@pytest.mark.usefixtures("compiled")
def test_threads_leave_every_bit_as_it_was() -> None:
    x, both, logits = random_bf16(37, 96), random_bf16(37, 192), random_bf16(37, 333)
    targets = torch.arange(37)

    def everything() -> list[Tensor]:
        mine = logits.clone()
        return [
            *native.rms_forward(x, x[0], 1e-5, OFFSET),
            native.gated_forward(both, GELU),
            native.cross_entropy(mine, targets),
            mine,
        ]

    before, one = torch.get_num_threads(), everything()
    try:
        torch.set_num_threads(2)
        two = everything()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.usefixtures("compiled")
def test_loss_of_hundreds_of_rows_by_kernels_equals_the_plain_one() -> None:
    hidden, weight = random_bf16(300, 64), random_bf16(515, 64, seed=1)
    targets = torch.randint(0, 515, (300,), generator=torch.Generator().manual_seed(2))
    mine, expected = (
        FusedLinearCrossEntropy.apply(hidden, weight, targets, native),
        FusedLinearCrossEntropy.apply(hidden, weight, targets, plain),
    )
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0.0)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this test find out anew whether there are kernels."""
    for name in ("library", "obstacle", "has_tiles"):
        monkeypatch.setattr(native, name, getattr(native, name).__wrapped__)


def test_machine_without_compiler_uses_torch_and_logs_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    forget(monkeypatch)
    assert native.library() is None
    adapted = adapt(base("Llama", **GROUPED))
    choice = fuse(adapted).choice
    assert not choice.native
    assert not choice.tiles
    assert any("no C++ compiler" in reason or "x86-64 Linux only" in reason for reason in choice.reasons)


def test_compiler_that_fails_leaves_no_kernels_and_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if why := native.obstacle():
        pytest.skip(why)
    broken = tmp_path / "bin" / "g++"
    broken.parent.mkdir()
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "g++ 0" && exit 0\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:/usr/bin:/bin")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)
    adapted = adapt(base("Llama", **GROUPED))
    assert not fuse(adapted).choice.native
    with pytest.raises(
        HardwareError, match=r"kernels\.implementation=native is not possible here: g\+\+ could not compile them"
    ):
        fuse(adapt(base("Llama", **GROUPED)), implementation="native")
    assert not list((tmp_path / "cache").rglob("*.so"))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'cc1plus: fatal error: No space left on device' >&2; exit 1", "No space left on device"),
        ("exit 0", "No such file or directory"),
    ],
)
def test_kernels_that_cannot_be_written_are_refused_with_the_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str
) -> None:
    """Without them the same run would make another adapter, so a full disk is not the same as no compiler."""
    if why := native.obstacle():
        pytest.skip(why)
    full = tmp_path / "bin" / "g++"
    full.parent.mkdir()
    full.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "g++ 0" && exit 0\n{script}\n')
    full.chmod(0o755)
    monkeypatch.setenv("PATH", f"{full.parent}:/usr/bin:/bin")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)
    with pytest.raises(HardwareError, match=rf"{message}.*\(TMPDIR\).*{tmp_path}/cache/kernels \(FINETUNE_CACHE\)"):
        fuse(adapt(base("Llama", **GROUPED)))
