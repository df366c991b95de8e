"""Figures about the inside of layers are checked against what is published about the methods."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import quantization_layers as layers
from benchmarks.published_orderings import check_claims
from finetune.bench.quantization_results import QuantizationResult
from tests.fixtures import forks

ROOT = Path(__file__).parents[2]

# Dettmers et al. 2023, QLoRA, appendix E: the sixteen levels of NormalFloat4.
NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip


def test_code_books_are_the_published_ones() -> None:
    books = layers.code_books()
    assert books["nf4"].tolist() == pytest.approx(NF4, abs=1e-6)
    assert len(books["fp4"]) == 15  # zero has two signs
    assert books["uniform"].diff().tolist() == pytest.approx([1 / 7] * 14, abs=1e-6)


def test_nf4_is_the_best_of_the_codes_for_normal_weights() -> None:
    weights = {"w": torch.randn(512, 512, generator=torch.Generator().manual_seed(1))}
    values = layers.normalized(weights)
    errors = {name: layers.code_error(values, code) for name, code in layers.code_books().items()}
    assert errors["nf4"] < errors["uniform"] < errors["fp4"]


@pytest.mark.parametrize(("block", "bits", "double"), [(64, 4.5, 4.127), (128, 4.25, 4.063), (256, 4.125, 4.032)])
def test_bits_a_weight_by_block_size(block: int, bits: float, double: float) -> None:
    figures = layers.block_size({"w": torch.randn(256, 96, generator=torch.Generator().manual_seed(1))}, block)
    assert (round(figures["bits"], 3), round(figures["double_bits"], 3)) == (bits, double)
    assert 0.08 < figures["rms"] < 0.11
    assert figures["rms"] <= figures["double_rms"] < figures["rms"] * 1.05


def test_smoothing_helps_where_one_input_channel_is_large() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(64, 32, generator=generator), torch.randn(16, 32, generator=generator)
    x[:, 3] *= 100
    figures = layers.smoothed(x, weight)
    assert figures["after"] < figures["before"] / 3
    assert layers.spread(x)["outlier_channels"] == 1


def test_an_error_is_measured_against_the_weights_own_size() -> None:
    weight = torch.tensor([[3.0, 4.0]])
    assert layers.distance(weight, torch.tensor([[3.0, 4.5]])) == pytest.approx(
        {"rms": 0.1, "max": 0.5, "cosine": 0.99849}, abs=1e-4
    )


def test_published_orderings_are_held_against_what_was_measured() -> None:
    def measured(backend: str, kl: float, bits: float) -> QuantizationResult:
        return QuantizationResult(backend=backend, status="measured", kl=kl, bits_per_parameter=bits)

    rows = [
        measured("int8", 0.01, 8.06),
        measured("nf4", 0.2, 4.5),
        measured("nf4_double", 0.2, 4.127),
        measured("fp4", 0.1, 4.5),
    ]
    claims = check_claims(rows)
    assert [claim.agrees for claim in claims] == [True, False, True, True, True]
    assert claims[1].measured == "KL 0.2000 (nf4), 0.1000 (fp4)"
    assert check_claims(rows[:1]) == []


@pytest.mark.slow
def test_the_command_writes_a_page(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    settings = ["--model", str(tiny_base), "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.quantization_layers", "data/general.txt", *settings]
    done = forks.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = out.read_text()
    assert all(text in page for text in ("Inside the layers", "Outliers", "SmoothQuant"))
    assert "http" not in page.replace("http-equiv", "")
