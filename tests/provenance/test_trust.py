"""What of a model is opened: code only as the files that were named, weights only as safetensors."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from finetune.config import load
from finetune.errors import ModelError
from finetune.model import ModelConfig, ModelSpec, fetch
from finetune.trust import remote_code_problems
from tests.fixtures.models import model_config

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).parent.joinpath("ran").touch()
Path({mark!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(tiny_base: Path, tmp_path: Path) -> Path:
    """A base whose architecture only its own code knows; the code leaves a mark when it is imported."""
    folder = shutil.copytree(tiny_base, tmp_path / "own")
    content = json.loads((folder / "config.json").read_text())
    content |= {
        "model_type": "own_llama",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    return folder


def named(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.py")}


def open_it(settings: ModelConfig) -> object:
    from finetune.hardware import Placement
    from finetune.quantization import QuantizationConfig

    placement = Placement(
        device="cpu", dtype="float32", attention="sdpa", optimizer="", optimizer_reason="", threads=1, reasons=()
    )
    plain = QuantizationConfig(method="none")
    return ModelSpec(base=fetch(settings), config=settings, quantization=plain, placement=placement).load()


def test_named_code_runs(own: Path, tmp_path: Path) -> None:
    assert type(open_it(model_config(str(own), remote_code=named(own)))).__name__ == "OwnModel"
    assert (tmp_path / "ran").exists()


def test_code_that_was_not_named_does_not_run_and_the_message_names_it(own: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"model.remote_code={{own.py: '{named(own)['own.py']}'}}"):
        open_it(model_config(str(own)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", ["changed", "added", "missing", "elsewhere"])
def test_other_code_than_was_named_is_refused_before_any_of_it_runs(own: Path, tmp_path: Path, change: str) -> None:
    files = named(own)
    if change == "changed":
        (own / "own.py").write_text((own / "own.py").read_text() + "# one more line\n")
    elif change == "added":
        (own / "more.py").write_text("")
    elif change == "missing":
        files["gone.py"] = "0" * 64
    else:
        content = json.loads((own / "config.json").read_text())
        content["auto_map"]["AutoModelForCausalLM"] = "somebody/else--own.OwnModel"
        (own / "config.json").write_text(json.dumps(content))
    expected = {
        "changed": "own.py has hash",
        "added": "more.py is not named",
        "missing": "gone.py is missing",
        "elsewhere": "another repository",
    }
    with pytest.raises(ModelError, match=f"{expected[change]}"):
        open_it(model_config(str(own), remote_code=files))
    assert not (tmp_path / "ran").exists()


def test_code_that_changes_after_it_was_fetched_is_refused_too(own: Path, tmp_path: Path) -> None:
    from finetune.hardware import Placement
    from finetune.quantization import QuantizationConfig

    settings = model_config(str(own), remote_code=named(own))
    base = fetch(settings)
    (own / "own.py").write_text("raise SystemExit('this ran')")
    placement = Placement(
        device="cpu", dtype="float32", attention="sdpa", optimizer="", optimizer_reason="", threads=1, reasons=()
    )
    plain = QuantizationConfig(method="none")
    with pytest.raises(ModelError, match="none of it has run"):
        ModelSpec(base=base, config=settings, quantization=plain, placement=placement).load()


def test_the_setting_that_a_message_offers_can_be_pasted(own: Path) -> None:
    with pytest.raises(ModelError) as caught:
        open_it(model_config(str(own)))
    offered = str(caught.value).rsplit('"', 2)[1]
    assert load(["+experiment=quickstart", "model=custom", f"model.name={own}", offered]).model.remote_code == named(
        own
    )


def test_code_of_a_hub_needs_commit_and_hashes() -> None:
    assert list(remote_code_problems({"own.py": "abc"}, revision="main")) == [
        "model.remote_code: own.py needs its SHA-256 (64 hex digits); got 'abc'",
        "model.remote_code runs code from the hub, so model.revision must pin it to a commit (40 hex digits); got main",
    ]


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_every_kind_of_pickle_is_refused_with_the_way_to_convert(tiny_base: Path, tmp_path: Path, file: str) -> None:
    shutil.copy(tiny_base / "config.json", tmp_path)
    (tmp_path / file).write_bytes(b"\x80")
    with pytest.raises(ModelError, match=rf"{file}, a pickle.*safe_serialization=True"):
        fetch(model_config(str(tmp_path)))
