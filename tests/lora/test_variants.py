"""Every variant leaves the base alone, and comes back from disk as what was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.inference.adapted import load_adapter
from finetune.lora import cast_adapter
from finetune.lora.config import DOUBLE_RANK, VARIANTS
from tests.fixtures.models import load
from tests.lora.helpers import RANK, adapt, config, logits, train

CHOICES = [(variant, method) for variant in VARIANTS for method in ("none", "nf4")] + [
    ("olora", "int8"),
    ("pissa", "int8"),
    ("eva", "int8"),
]
CHOICES.remove(("loftq", "none"))


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    named = (
        (name.removeprefix("base_model.model.").replace(".base_layer", ""), p) for name, p in model.named_parameters()
    )
    return {name: p.detach().clone() for name, p in named if "lora_" not in name}


@pytest.mark.parametrize(("variant", "method"), CHOICES)
def test_reloaded_graph_is_the_trained_one_to_the_bit(
    loud_base: Path, documents: list[list[int]], tmp_path: Path, variant: str, method: str
) -> None:
    adapted = adapt(loud_base, method, variant, documents)
    before = logits(adapted, documents[0])
    losses = train(adapted, documents[0])
    assert losses[-1] < losses[0] - 0.3
    trained = logits(adapted, documents[0])
    assert (trained - before).abs().max() > 0.1
    adapted.save_pretrained(tmp_path)
    again = load_adapter(load(loud_base, method, double=method == "nf4"), tmp_path, upcast="none")
    assert torch.equal(logits(again, documents[0]), trained)


@pytest.mark.parametrize(("variant", "method"), CHOICES)
def test_first_logits_are_the_bases_and_its_weights_stay(
    loud_base: Path, documents: list[list[int]], variant: str, method: str
) -> None:
    untouched = base_weights(load(loud_base, method, double=method == "nf4"))
    adapted = adapt(loud_base, method, variant, documents)
    now = base_weights(adapted)
    assert untouched.keys() == now.keys()
    assert all(torch.equal(untouched[name], now[name]) for name in now)
    on = logits(adapted, documents[0])
    with adapted.disable_adapter():
        off = logits(adapted, documents[0])
    bound = config(variant).step0_bound
    if bound is None:
        assert (on - off).abs().max() > 0.1 * off.std()
    else:
        assert (on - off).abs().max() <= bound * off.std()
        assert (on - off).abs().max() == 0, "in bfloat16 even the sums that cancel leave nothing"


@pytest.mark.parametrize("variant", DOUBLE_RANK)
def test_start_stays_where_it_was_also_after_a_checkpoint(
    loud_base: Path, documents: list[list[int]], tmp_path: Path, variant: str
) -> None:
    adapted = adapt(loud_base, "nf4", variant, documents)
    start = {name: p.detach().clone() for name, p in adapted.named_parameters() if "lora_" in name}
    train(adapted, documents[0])
    adapted.save_pretrained(tmp_path)
    resumed = adapt(loud_base, "nf4", variant, documents)
    resumed.load_adapter(str(tmp_path), "default", is_trainable=True)  # as transformers' Trainer does
    train(resumed, documents[0])
    for name, p in resumed.named_parameters():
        if "lora_A" in name:
            assert torch.equal(p[RANK:], start[name][RANK:])
            assert not torch.equal(p[:RANK], start[name][:RANK])
        elif "lora_B" in name:
            assert torch.equal(p[:, RANK:], start[name][:, RANK:])


def test_rslora_scales_by_the_root_of_the_rank(loud_base: Path, documents: list[list[int]]) -> None:
    adapted = adapt(loud_base, "none", "rslora", documents)
    assert adapted.get_base_model().model.layers[0].mlp.up_proj.scaling["default"] == 8 / RANK**0.5


def test_lengths_of_dora_stay_in_float32(loud_base: Path, documents: list[list[int]]) -> None:
    adapted = adapt(loud_base, "nf4", "dora", documents, dtype="bfloat16")
    assert cast_adapter(adapted, "bfloat16") == 0
    found = {"magnitude" in name: p.dtype for name, p in adapted.named_parameters() if p.requires_grad}
    assert found == {True: torch.float32, False: torch.bfloat16}


def test_adapter_on_disk_names_no_start_that_loading_would_repeat(
    loud_base: Path, documents: list[list[int]], tmp_path: Path
) -> None:
    import json

    for variant in VARIANTS:
        adapt(loud_base, "nf4", variant, documents).save_pretrained(tmp_path / variant)
        saved = json.loads((tmp_path / variant / "adapter_config.json").read_text())
        assert saved["init_lora_weights"] is True
        assert saved["r"] == config(variant).width == (8 if variant in DOUBLE_RANK else 4)


@pytest.mark.parametrize(
    ("variant", "method", "decay", "problem"),
    [
        ("loftq", "none", 0.0, "choose quantization=nf4, or another variant such as lora.variant=eva"),
        ("loftq", "int8", 0.0, "choose quantization=nf4"),
        ("dora", "int8", 0.0, "loses an int8 layer's scales"),
        ("pissa", "nf4", 0.01, "set optim.weight_decay=0"),
        ("olora", "none", 0.01, "set optim.weight_decay=0"),
    ],
)
def test_what_does_not_go_with_other_groups_is_a_problem(variant: str, method: str, decay: float, problem: str) -> None:
    found = list(config(variant).conflicts(quantization=method, weight_decay=decay))
    assert len(found) == 1
    assert problem in found[0]
    assert not list(config(variant).problems())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_goes_with_the_quickstarts_base(variant: str) -> None:
    assert not list(config(variant).conflicts(quantization="nf4", weight_decay=0.0))


def test_unknown_variant_and_too_little_calibration_are_named() -> None:
    assert "lora.variant must be one of lora, rslora" in next(config("adalora").problems())
    assert list(config("eva", calibration_tokens=7).problems()) == [
        "lora.calibration_tokens must be at least twice lora.rank, or variant=eva cannot find 4 directions; got 7"
    ]
