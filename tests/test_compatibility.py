"""What does not fit together is refused after the data are prepared, before any weights are loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.cli import main
from tests.fixtures.overrides import overrides

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 600, "n_embd": 16, "n_layer": 1,
        "n_head": 2, "n_positions": 512}  # fmt: skip
STORED = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def base_with(base: Path, target: Path, file: str, *, changes: dict[str, Any], fresh: bool = False) -> Path:
    """Copies a base and changes one of its files."""
    shutil.copytree(base, target)
    content = json.loads((target / file).read_text()) if (target / file).is_file() and not fresh else {}
    (target / file).write_text(json.dumps(content | changes))
    return target


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"quantization_config": STORED}, "stored quantized (quantization_config: bitsandbytes, 4 bits"),
        ("config.json", {"max_position_embeddings": 16}, "are longer than the model's 16 positions (the longest has"),
        ("config.json", {"vocab_size": 90}, "and the model's embedding 90 rows; the data contain token"),
        ("config.json", {"hidden_act": "nothing"}, "describes no model that transformers can build: KeyError"),
        ("generation_config.json", {"num_return_sequences": 3}, "transformers does not save again"),
        ("config.json", GPT2, "c_attn, c_fc, c_proj are Conv1D layers"),
    ],
    ids=["4-bit base", "positions", "vocabulary", "activation", "generation", "Conv1D"],
)
def test_base_that_does_not_fit_is_refused(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], file: str, changes: Any, message: str
) -> None:
    base = base_with(tiny_base, tmp_path / "base", file, changes=changes, fresh=changes is GPT2)
    assert main([*overrides(tmp_path, base), "tracking=[]", "export=[adapter]"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert not (tmp_path / "outputs" / "tiny" / "model").exists(), "weights were loaded"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lora.targets=[query]"], "lora.targets: query match no linear layer. This model has down_proj"),
        (["lora.tokens=['<tool>']"], "lora.tokens: <tool> not in the vocabulary"),
        (["data.heldout_path=null", "run.until=merge"], "there are no held-out rows, and the stages after train"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    assert main([*overrides(tmp_path, tiny_base), "tracking=[]", *settings]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "outputs" / "tiny" / "model").exists(), "weights were loaded"


def test_settings_that_contradict_sampling_are_only_warned_about(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Llama 2 was published: transformers saves them again."""
    changes = {"do_sample": False, "temperature": 0.9, "max_length": 20}
    base = base_with(tiny_base, tmp_path / "base", "generation_config.json", changes=changes)
    assert main([*overrides(tmp_path, base), "tracking=[]", "run.until=data"]) == 0, capsys.readouterr().err
