"""Every shipped experiment is walked from data to report, with two layers of its base's class."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from benchmarks.walk import ROOT, Walk, exports, overrides
from benchmarks.walk_base import make_base
from finetune.chat_templates import read_template, tokenizer_template
from finetune.cli import main
from finetune.config import RunConfig, load
from finetune.paths import CONF

EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
SMALL = ("optim.learning_rate=1e-2", "merge.max_loss_increase=5", "eval.bootstrap_samples=50", "hardware.threads=1")
"""Three steps at a recipe's own rate change less than bfloat16 rounds away. A random model's losses are no measure."""


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_is_walked_to_its_report(
    experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load([f"+experiment={experiment}"])
    parameters = make_base(recipe, tmp_path / "base", tiny=True)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = Walk(experiment=experiment, size="tiny", overrides=SMALL)
    assert main(overrides(recipe, settings, tmp_path)) == 0, capsys.readouterr().err
    run = tmp_path / "outputs" / "walk"
    report = json.loads((run / "report.json").read_text())
    assert (report["status"], report["model"]["parameters"]) == ("complete", parameters)
    assert report["model"]["quantization"]["method"] == recipe.quantization.method
    assert report["train"]["optimizer"]["asked"] == recipe.optim.name
    assert adapted_layers(run / "train" / "adapter") == expected_layers(recipe, tmp_path / "base")
    assert_the_rows_have_the_template_of(recipe, run, tmp_path / "base")
    assert_the_merge_is_what_was_trained(report)
    exported = {export["format"]: export for export in report["export"]}
    formats = [name.partition("_")[0] for name in exports(recipe)]
    assert set(exported) == {*formats, "card"}
    assert all(exported[name]["parity"]["passed"] for name in formats)


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "prefix", "routers"), [("each", "expert", False), ("shared", "common", True)])
def test_a_mixture_with_adapted_experts_is_walked_to_its_report(
    experts: str,
    prefix: str,
    routers: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its experts are on the disk one by one, as on the hub; the shipped mixture's are 3-D parameters here."""
    from transformers import AutoModelForCausalLM

    settings_of_lora = (f"lora.experts={experts}", f"lora.routers={routers}", "lora.targets=[q_proj,v_proj]")
    more = ("model=mixtral_8x7b", *settings_of_lora)
    recipe = load(["+experiment=qwen3_30b_a3b_qlora", *more])
    parameters = make_base(recipe, tmp_path / "base", tiny=True)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="bfloat16")
    model._weight_conversions = None  # saves with the names of the hub, whatever the names on the disk were
    model.save_pretrained(tmp_path / "base")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = Walk(experiment="qwen3_30b_a3b_qlora", size="tiny", overrides=(*SMALL, *more[1:]))
    assert main(overrides(recipe, settings, tmp_path)) == 0, capsys.readouterr().err
    run = tmp_path / "outputs" / "walk"
    report = json.loads((run / "report.json").read_text())
    assert (report["status"], report["model"]["parameters"]) == ("complete", parameters)
    adapted = {f"{prefix}_{layer}" for layer in ("gate", "up", "down")}
    assert adapted_layers(run / "train" / "adapter") == {"q_proj", "v_proj", *adapted}
    with safe_open(run / "merge" / "model" / "model.safetensors", framework="pt") as tensors:
        assert "model.layers.1.block_sparse_moe.experts.3.w1.weight" in tensors.keys()  # noqa: SIM118  # no mapping
        merged = tensors.get_tensor(ROUTER)
    with safe_open(tmp_path / "base" / "model.safetensors", framework="pt") as tensors:
        assert torch.equal(merged, tensors.get_tensor(ROUTER)) != routers
    assert_the_merge_is_what_was_trained(report)
    assert all(export["parity"]["passed"] for export in report["export"] if export["format"] != "card")


def assert_the_rows_have_the_template_of(recipe: RunConfig, run: Path, base: Path) -> None:
    """The one that the recipe names, or its model option for a base without one; else the tokenizer's own."""
    rendered = json.loads((run / "data" / "rendering.json").read_text(encoding="utf-8"))["template"]
    name = recipe.data.template or recipe.model.template
    settings = re.match(r"({%- set enable_thinking = \w+ %}\n)?", rendered)  # written in front by data.thinking
    assert settings
    assert rendered[settings.end() :] == (read_template(name) if name else tokenizer_template(base))


def adapted_layers(adapter: Path) -> set[str]:
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as tensors:
        return {name.split(".")[-3] for name in tensors.keys() if "lora_A" in name}  # noqa: SIM118  # no mapping


def expected_layers(recipe: RunConfig, base: Path) -> set[str]:
    with safe_open(base / "model.safetensors", framework="pt") as tensors:
        linear = {name.split(".")[-2] for name in tensors.keys() if re.search(r"proj\w*\.weight", name)}  # noqa: SIM118
    return linear if recipe.lora.targets == ["all-linear"] else set(recipe.lora.targets)


def assert_the_merge_is_what_was_trained(report: dict[str, Any]) -> None:
    """The dequantized candidate lost little of what training changed, the original one the quantization's error."""
    candidates = {candidate["name"]: candidate for candidate in report["merge"]["candidates"]}
    artifacts = report["eval"]["artifacts"]
    learned = abs(artifacts["adapter"]["loss"] - artifacts["base_quantized"]["loss"])
    assert abs(candidates["dequantized"]["loss"] - artifacts["adapter"]["loss"]) < learned / 4
    assert candidates["dequantized"]["kl"] < candidates["original"]["kl"] / 10
