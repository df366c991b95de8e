"""The merged model as GGUF is loaded in llama.cpp and compared; its quantization mixes are llama.cpp's."""

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ExportError
from finetune.products import Exports
from tests.fixtures.artifacts import Made
from tests.fixtures.exports import Facts

pytest.importorskip("gguf", reason="needs pip install 'finetune-qlora[gguf]'")
pytest.importorskip("xllamacpp", reason="needs pip install 'finetune-qlora[gguf]'")

from gguf import GGUFReader

from finetune.export.gguf.quant_types import QUANT_MIXES, QuantType, tensor_type

BOUNDS = {
    "f16": 0.001,
    "bf16": 0.001,
    "q8_0": 0.01,
    "q6_k": 0.02,
    "q5_k_m": 0.05,
    "q4_k_m": 0.1,
    "q4_0": 0.5,
}
"""KL of the tiny random model, in nats."""


@pytest.fixture(scope="module")
def exported(run: Callable[..., Exports], tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return run(tmp_path_factory.mktemp("run") / "export", "gguf", "card", dtype="q8_0", rows=3)


def test_gguf_runs_in_llama_cpp_as_the_model_does(exported: Exports) -> None:
    made, _ = exported.exports
    parity = made.parity
    assert parity.runtime.startswith("xllamacpp ")
    assert parity.chats == 4
    assert parity.kl < BOUNDS["q8_0"]
    assert abs(parity.loss_difference.difference) < 0.01
    assert (parity.answers.rows, parity.answers.model.name) == (3, "merged")
    assert 0 < parity.answers.mean_tokens <= 6
    assert {file.name for file in (exported.folder / "gguf").iterdir()} == {"model.gguf", "Modelfile", "README.md"}
    assert "KL" in (exported.folder / "README.md").read_text()


def test_snippet_of_the_card_is_the_one_that_parity_ran(exported: Exports) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (exported.folder / "README.md").read_text(), flags=re.S)
    assert 'params.model.path = "gguf/model.gguf"' in code.replace("'", '"')
    assert "ollama create" in code


def test_file_carries_the_template_and_the_special_tokens(exported: Exports, tokenizer: Any) -> None:
    reader = GGUFReader(exported.folder / "gguf" / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    ids = [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert ids == [1, 2, 0]
    assert fields["tokenizer.ggml.add_bos_token"] is False  # the template writes it, the tokenizer does not
    assert fields["general.file_type"] == QUANT_MIXES["q8_0"].file_type


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [dtype for dtype in QUANT_MIXES if dtype != "q8_0"])
def test_every_format_runs_within_its_bound(run: Callable[..., Exports], tmp_path: Path, dtype: str) -> None:
    (made,) = run(
        tmp_path / "export", "gguf", dtype=dtype, max_kl=BOUNDS[dtype], max_logit_difference=100, loss_rows=0
    ).exports
    forced = [note for note in made.notes if "matrices" in note]
    assert made.parity.passed
    assert bool(forced) == dtype.endswith(("_k", "_k_m", "q4_0"))  # no row of this model is a multiple of 256


def test_tensors_with_another_type_are_counted_and_reported(
    run: Callable[..., Exports], tmp_path: Path, capsys: Any
) -> None:
    (made,) = run(
        tmp_path / "export", "gguf", dtype="q4_k_m", max_kl=1.0, max_logit_difference=100, loss_rows=0, logit_rows=0
    ).exports
    assert made.notes == [
        "15 of 15 matrices have rows of 64 and 128 weights, which the blocks of 256 of Q4_K_M do not divide; they "
        "have more bits, as llama.cpp writes them: 12 as Q5_0, 3 as Q8_0"
    ]
    assert "15 of 15 matrices" in " ".join(capsys.readouterr().out.split())
    kinds = Counter(tensor.tensor_type for tensor in GGUFReader(tmp_path / "export" / "gguf" / "model.gguf").tensors)
    assert kinds == {QuantType.Q5_0: 12, QuantType.Q8_0: 3, QuantType.F32: 5}


def test_export_that_differs_is_not_kept_in_place_of_a_good_one(
    run: Callable[..., Exports],
    merged: Facts,
    tmp_path: Path,
) -> None:
    place = tmp_path / "export" / "gguf"
    place.mkdir(parents=True)
    (place / "good").write_text("an earlier export")
    with pytest.raises(ExportError, match=r"export.gguf differs from the model"):
        run(tmp_path / "export", "gguf", dtype="q4_0", max_kl=0.0, loss_rows=0)
    other = tmp_path / "other"
    shutil.copytree(merged.folder, other)
    template = other / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "<|im_end|> "))
    with pytest.raises(ExportError, match="its tokenizer writes the chat"):
        run(tmp_path / "export", "gguf", dtype="q8_0", loss_rows=0, from_merged=Facts(folder=other))
    assert [file.name for file in place.iterdir()] == ["good"]


def test_missing_package_and_full_disk_are_reported_before_anything_is_written(
    run: Callable[..., Exports],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ExportError, match=r"model.gguf needs .* and 1000 B are free; free some space"):
        run(tmp_path / "export", "gguf", dtype="bf16")
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ExportError, match=r"needs xllamacpp: pip install 'finetune-qlora\[gguf\]'"):
        run(tmp_path / "export", "gguf", dtype="bf16")
    assert not (tmp_path / "export" / "gguf").exists()


def test_another_interface_of_llama_cpp_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.export.gguf import library

    library.load_library.cache_clear()
    monkeypatch.setitem(library.DEFAULTS, "n_batch", 77)
    with pytest.raises(ExportError, match="starts with n_batch=2048, not 77"):
        library.load_library()


def names_of(layers: int, *, tied: bool = False) -> list[str]:
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    inner = [f"blk.{layer}.{part}.weight" for layer in range(layers) for part in parts]
    return [*inner, "token_embd.weight", *([] if tied else ["output.weight"])]


@pytest.mark.parametrize(
    ("dtype", "layers", "counts"),
    [
        ("q4_k_m", 32, {QuantType.Q4_K: 193, QuantType.Q6_K: 33}),
        ("q5_k_m", 32, {QuantType.Q5_K: 193, QuantType.Q6_K: 33}),
        ("q6_k", 32, {QuantType.Q6_K: 226}),
        ("q4_0", 32, {QuantType.Q4_0: 225, QuantType.Q6_K: 1}),
        ("q8_0", 32, {QuantType.Q8_0: 226}),
        ("q4_k_m", 80, {QuantType.Q4_K: 441, QuantType.Q5_K: 40, QuantType.Q6_K: 81}),
    ],
)
def test_quant_mixes_are_those_of_llama_cpp(dtype: str, layers: int, counts: dict[QuantType, int]) -> None:
    """Counts as llama.cpp prints them when it loads Llama 3 8B, and Llama 2 70B, in these formats."""
    mix, names = QUANT_MIXES[dtype], names_of(layers)
    types = [tensor_type(name, (4096, 4096), mix=mix, layers=layers, tied=False, grouped=True) for name in names]
    assert Counter(quant_type for quant_type, _ in types) == counts
    assert not any(forced for _, forced in types)


def test_attention_next_to_eight_experts_has_more_bits() -> None:
    """As llama.cpp quantizes Mixtral 8x7B as Q4_K_M: keys and values in 8 bits, outputs in 5; the router stays."""
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up_exps", "ffn_gate_inp")
    mix = QUANT_MIXES["q4_k_m"]
    types = [
        tensor_type(f"blk.9.{name}.weight", (4096, 4096), mix=mix, layers=32, tied=False, grouped=True, experts=8)[0]
        for name in names
    ]
    wanted = [QuantType.Q4_K, QuantType.Q8_0, QuantType.Q8_0, QuantType.Q5_K, QuantType.Q4_K, QuantType.F32]
    assert types == wanted


def test_ggml_writes_k_blocks_that_the_gguf_package_reads_back() -> None:
    import numpy as np
    from gguf import dequantize

    from finetune.export.gguf.library import quantize
    from finetune.export.gguf.quant_types import row_bytes

    rows = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    for quant_type, error in (
        (QuantType.Q4_K, 0.1),
        (QuantType.Q5_K, 0.05),
        (QuantType.Q6_K, 0.03),
        (QuantType.Q8_0, 0.01),
        (QuantType.Q4_0, 0.13),
    ):
        back = dequantize(quantize(rows, quant_type, row_bytes=row_bytes(quant_type, 512)), quant_type)
        assert 0 < float(np.sqrt(((back - rows) ** 2).mean())) < error


def test_model_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    from finetune.export.gguf.architecture import Layout

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ExportError, match=r"GGUF export knows gemma, gemma2, .* is a gpt2: ship it as safetensors"):
        Layout(tmp_path)


def test_every_shipped_format_is_known() -> None:
    from finetune.config import load

    shipped = load(["+experiment=quickstart", f"export=[{','.join(f'gguf_{dtype}' for dtype in QUANT_MIXES)}]"]).export
    assert [shipped[f"gguf_{dtype}"].dtype for dtype in QUANT_MIXES] == list(QUANT_MIXES)


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"up_proj": 32}, "rank_pattern": {"q_proj": 2}}], ids=str
)
def test_adapter_on_a_gguf_base_is_the_adapter_on_the_dense_base(
    run: Callable[..., Exports],
    loud_base: Path,
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    from tests.fixtures.artifacts import make_adapter

    made = make_adapter(loud_base, tmp_path / "train", **settings)
    (export,) = run(tmp_path / "export", "gguf_lora", dtype="bf16", from_adapter=made.folder, loss_rows=0).exports
    assert export.parity.kl < BOUNDS["bf16"]
    assert "ADAPTER ./adapter.gguf" in (tmp_path / "export" / "gguf_lora" / "Modelfile").read_text()


def test_adapter_that_llama_cpp_cannot_add_is_refused(
    run: Callable[..., Exports], loud_base: Path, tmp_path: Path
) -> None:
    from tests.fixtures.artifacts import make_adapter

    made: Made = make_adapter(loud_base, tmp_path / "train", use_dora=True)
    with pytest.raises(
        ExportError, match=r"lora_magnitude_vector, and llama.cpp adds nothing but low-rank .* export gguf_q8_0"
    ):
        run(tmp_path / "export", "gguf_lora", dtype="bf16", from_adapter=made.folder)
