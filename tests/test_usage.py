"""The commands that a run prints at its end: those of its exports, and no others."""

import shlex
from pathlib import Path

import pytest

from finetune.usage import export_commands, run_commands

ADAPTER, MERGED, GGUF = ("adapter", "export/adapter"), ("safetensors", "export/merged"), ("gguf", "export/gguf_q8_0")


def commands(run: Path, *exports: tuple[str, str]) -> dict[str, str]:
    return {use.title: use.command for use in run_commands(run, exports)}


def test_adapter_is_chatted_with_compared_served_and_verified() -> None:
    assert commands(Path("outputs/first"), ADAPTER) == {
        "chat": "finetune chat run.name=first",
        "compare": "finetune chat run.name=first --compare",
        "serve": "finetune serve run.name=first",
        "verify": "finetune verify run.name=first url=127.0.0.1:8000 model=first",
        "Python": "python -c 'import finetune; model, tokenizer = finetune.load(\"outputs/first\")'",
    }


def test_merged_model_alone_has_the_name_of_the_run_and_no_base_to_compare_with() -> None:
    found = commands(Path("outputs/first"), MERGED)
    assert "compare" not in found
    assert found["verify"].endswith("model=first")
    assert found["vLLM"] == "vllm serve outputs/first/export/merged --served-model-name merged"
    assert found["verify vLLM"].endswith("url=127.0.0.1:8000 model=merged")


def test_ollama_needs_a_modelfile(tmp_path: Path) -> None:
    run = tmp_path / "First run"
    (run / "export" / "gguf_q8_0").mkdir(parents=True)
    assert "Ollama" not in commands(run, GGUF)
    (run / "export" / "gguf_q8_0" / "Modelfile").touch()
    found = commands(run, GGUF)
    words = shlex.split(found["Ollama"])
    assert words[:5] == ["ollama", "create", "first run", "-f", str(run / "export" / "gguf_q8_0" / "Modelfile")]
    assert shlex.split(found["verify Ollama"])[-2:] == ["--artifact", "gguf_q8_0"]
    assert shlex.split(found["chat"]) == ["finetune", "chat", "run.name=First run", f"run.root={tmp_path}"]


def test_packed_exports_have_the_command_of_vllm_alone() -> None:
    packed = [("awq", "export/awq_int4"), ("fp8", "export/fp8")]
    assert commands(Path("outputs/first"), *packed) == {
        f"vLLM, {kind}": f"vllm serve outputs/first/{path} --served-model-name merged" for kind, path in packed
    }
    found = [use.command for use in export_commands(Path("outputs/x/export"), [("fp8", "fp8")])]
    assert found == ["vllm serve fp8 --served-model-name merged"]


@pytest.mark.parametrize("exports", [[], [("card", "export/README.md")], [("onnx", "export/onnx")]])
def test_run_with_nothing_to_serve_has_no_commands(exports: list[tuple[str, str]]) -> None:
    assert run_commands(Path("outputs/first"), exports) == []


def test_card_names_exports_where_they_are() -> None:
    uses = export_commands(Path("outputs/x/export"), [("safetensors", "merged"), ("adapter", "adapter")])
    assert [use.command for use in uses] == [
        "finetune chat adapter",
        "finetune serve adapter",
        "vllm serve merged --served-model-name merged",
    ]
