"""Each initialisation is the one of its paper, and is refused where what it needs is missing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import ModelError
from finetune.lora import attach
from finetune.lora.config import DOUBLE_RANK
from finetune.lora.init import dense_weight, lora_layers
from tests.fixtures.models import load
from tests.lora.helpers import RANK, TARGETS, adapt, config, logits, train


@pytest.mark.parametrize("variant", DOUBLE_RANK)
def test_start_in_the_weights_trains_as_the_published_form_does(
    loud_base: Path, documents: list[list[int]], variant: str
) -> None:
    """As published, B0 A0 is subtracted from the weight; here it is kept next to it. In float32 that is the same
    training."""
    import peft
    from transformers import AutoModelForCausalLM

    ours, theirs = (AutoModelForCausalLM.from_pretrained(loud_base, dtype=torch.float32) for _ in range(2))
    adapted = attach(ours, config(variant), upcast="none", checkpointing=False, seed=1)
    published = peft.get_peft_model(
        theirs, peft.LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    started = lora_layers(adapted)
    for name, layer in lora_layers(published).items():
        a = started[name].lora_A["default"].weight.detach()[:RANK].clone()
        b = started[name].lora_B["default"].weight.detach()[:, :RANK].clone()
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
        layer.base_layer.weight.data -= layer.scaling["default"] * b @ a
    assert train(adapted, documents[0], steps=6) == pytest.approx(train(published, documents[0], steps=6), abs=2e-3)
    difference = logits(adapted, documents[1]) - logits(published, documents[1])
    assert difference.abs().mean() < 0.01 * logits(adapted, documents[1]).std()


@pytest.mark.filterwarnings("ignore")
def test_olora_starts_where_peft_starts_it(loud_base: Path, documents: list[list[int]]) -> None:
    import peft

    ours = adapt(loud_base, "none", "olora", documents)
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=8, target_modules=TARGETS, init_lora_weights="olora", task_type="CAUSAL_LM"
    )
    theirs = lora_layers(peft.get_peft_model(load(loud_base, "none"), settings))
    for name, layer in lora_layers(ours).items():
        assert torch.allclose(
            layer.lora_A["default"].weight[:RANK], theirs[name].lora_A["default"].weight, rtol=0.01, atol=1e-3
        )
        assert torch.allclose(
            layer.lora_B["default"].weight[:, :RANK], theirs[name].lora_B["default"].weight, rtol=0.01, atol=1e-3
        )


def test_pissa_takes_the_largest_singular_values(loud_base: Path, documents: list[list[int]]) -> None:
    adapted = adapt(loud_base, "none", "pissa", documents)
    layer = adapted.get_base_model().model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    weight = layer.base_layer.weight.float()
    left = weight - layer.scaling["default"] * b[:, :RANK] @ a[:RANK]
    assert torch.linalg.svdvals(left)[0].item() == pytest.approx(torch.linalg.svdvals(weight)[RANK].item(), rel=1e-3)
    assert torch.equal(a[:RANK], a[RANK:])
    assert torch.equal(b[:, :RANK], -b[:, RANK:])
    assert layer.scaling["default"] == 2.0, "alpha / rank, though the rank on disk is twice that"


@pytest.mark.filterwarnings("ignore")
def test_eva_finds_directions_as_good_as_pefts_and_as_the_best(loud_base: Path, documents: list[list[int]]) -> None:
    import peft

    row = documents[2]
    targets = ["q_proj", "up_proj", "down_proj"]
    ours = attach(
        load(loud_base, "none"),
        config("eva", targets=targets),
        upcast="none",
        checkpointing=False,
        seed=1,
        calibration=[row],
    )
    settings = peft.LoraConfig(
        r=RANK,
        lora_alpha=8,
        target_modules=targets,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(load(loud_base, "none"), settings)
    batch = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
    peft.initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    seen: dict[str, torch.Tensor] = {}
    plain = load(loud_base, "none")
    for name, module in plain.named_modules():
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0][0].float()}) if inputs else None
        )
    logits(plain, row)
    for name, layer in lora_layers(ours).items():
        inputs = seen[name] - seen[name].mean(dim=0)
        best = torch.linalg.svdvals(inputs)[:RANK].square().sum()
        other = lora_layers(theirs)[name]
        found, expected = (one.lora_A["default"].weight.float() for one in (layer, other))
        assert (inputs @ found.T).square().sum() > 0.99 * max(best, (inputs @ expected.T).square().sum()), name
    assert not any(p.any() for name, p in ours.named_parameters() if "lora_B" in name)


def test_padding_is_no_direction(loud_base: Path, documents: list[list[int]]) -> None:
    from finetune.lora.init import batches, input_directions

    made = batches(documents, tokens=60)
    assert [batch["attention_mask"].sum().item() for batch in made] == [71, 80]
    base = load(loud_base, "none")
    base.get_input_embeddings().weight.data[0] = torch.randn(
        64, generator=torch.Generator().manual_seed(2)
    )  # the padding's, 0 so far
    alone, padded = (
        input_directions(base, ["q_proj"], documents=given, rank=RANK, seed=1)
        for given in ([documents[0]], [documents[0], [7]])
    )
    name = "model.layers.0.self_attn.q_proj"
    assert torch.linalg.svdvals(alone[name] @ padded[name].T).min() > 0.97


@pytest.mark.parametrize("method", ["none", "nf4", "fp4", "int8"])
def test_start_is_made_of_the_weight_that_multiplies(loud_base: Path, method: str) -> None:
    base = load(loud_base, method)
    layer = base.model.layers[0].mlp.down_proj
    logits(base, [5, 6, 7])  # int8 layers keep their scales elsewhere after the first pass
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = layer(x).float()
    assert (x.float() @ dense_weight(layer).T - expected).abs().max() < 0.01 * expected.abs().max()
    assert torch.equal(layer(x).float(), expected), "reading it changed nothing"


def test_loftq_starts_at_the_best_correction_of_the_rounding(loud_base: Path, documents: list[list[int]]) -> None:
    from safetensors.torch import load_file

    originals = load_file(loud_base / "model.safetensors")
    for name, layer in lora_layers(adapt(loud_base, "nf4", "loftq", documents)).items():
        error = originals[f"{name}.weight"].float() - dense_weight(layer.base_layer)
        a, b = (matrix["default"].weight.detach() for matrix in (layer.lora_A, layer.lora_B))
        left = error - layer.scaling["default"] * b @ a
        best = torch.linalg.svdvals(error)[RANK:].square().sum().sqrt()
        assert left.norm().item() == pytest.approx(best.item(), rel=1e-3)
        assert left.norm() < 0.97 * error.norm()


@pytest.mark.parametrize(
    ("variant", "method", "given", "message"),
    [
        ("eva", "none", {}, "eva needs at least 8 tokens of training documents to find 4 directions; got 0"),
        ("loftq", "nf4", {}, "loftq needs the folder of the unquantized base"),
        ("loftq", "none", {"original": Path("x")}, "x has no"),
        ("pissa", "nf4", {"rank": 65}, "has only 64 directions to initialise from; use at most lora.rank=64"),
    ],
)
def test_variant_that_lacks_its_start_is_refused(
    loud_base: Path, variant: str, method: str, given: dict[str, Any], message: str
) -> None:
    settings = config(variant, rank=given.pop("rank", RANK))
    with pytest.raises(ModelError, match=message):
        attach(load(loud_base, method), settings, upcast="none", checkpointing=False, seed=1, **given)


def test_loftq_on_a_base_that_is_not_in_4_bits_is_refused(loud_base: Path, documents: list[list[int]]) -> None:
    with pytest.raises(ModelError, match="is not in 4 bits, so it has no rounding error to correct"):
        adapt(loud_base, "int8", "loftq", documents)


def test_documents_are_cut_out_of_their_packs_up_to_so_many_tokens(tmp_path: Path, tokenizer: Any) -> None:
    from datasets import load_from_disk

    from finetune.lora import read_documents
    from tests.fixtures.rows import prepared_rows

    data = prepared_rows(tmp_path, tokenizer)
    pack = load_from_disk(str(data.folder / "train"))[0]
    first, second = pack["seq_lengths"][:2]
    found = read_documents(data.folder / "train", tokens=first + 3)
    assert found == [pack["input_ids"][:first], pack["input_ids"][first : first + 3]]
    assert second > 3
    assert sum(map(len, read_documents(data.folder / "train", tokens=10**6))) == data.tokens
