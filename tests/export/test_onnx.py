"""The ONNX graph is the merged model, through its cache too, and says what is missing where it cannot be made."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, MistralConfig

from finetune.errors import ExportError
from finetune.export.needs import PACKAGES
from finetune.export.onnx import make, onnx_snippet
from finetune.export.onnx_runtime import _last_logits, _loss
from finetune.products import Exports
from tests.fixtures.exports import Facts

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in PACKAGES["onnx"]),
    reason="needs pip install 'finetune-qlora[onnx]'",
)


@pytest.fixture(scope="module")
def exported(run: Callable[..., Exports], tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return run(tmp_path_factory.mktemp("run") / "export", "onnx", "card")


@needs_onnx
def test_graph_gives_the_models_logits_loss_and_end(exported: Exports) -> None:
    parity = exported.exports[0].parity
    assert parity.runtime.startswith("onnxruntime")
    assert parity.max_logit_difference < 1e-4
    assert parity.chats == 4
    assert abs(parity.loss_difference.difference) < 1e-5
    assert {"model.onnx", "config.json", "tokenizer.json"} <= {
        file.name for file in (exported.folder / "onnx").iterdir()
    }


@needs_onnx
def test_snippet_of_the_card_writes_what_the_model_writes(
    exported: Exports,
    merged: Facts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (exported.folder / "README.md").read_text(), flags=re.S)
    monkeypatch.chdir(exported.folder)
    names: dict[str, object] = {}
    exec(code, names)
    model = AutoModelForCausalLM.from_pretrained(merged.folder / "model", dtype=torch.float32)
    prompt = [1, 40, 50, 60, 70, 80, 90, 30, 31, 32, 33]
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
    assert names["generate"](prompt, 8) == wanted  # type: ignore[operator]


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("dtype", ["int8", "int4", "int8_dynamic"])
def test_rounded_graph_is_another_model_within_its_own_bound(
    run: Callable[..., Exports], tmp_path: Path, dtype: str
) -> None:
    (one,) = run(tmp_path / "export", "onnx", dtype=dtype, max_logit_difference=10.0, max_kl=1.0).exports
    assert one.parity.kl > 0


SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "window": MistralConfig(**SIZES, sliding_window=10),
    "alternating windows": Gemma2Config(**SIZES, sliding_window=10, head_dim=16),
    "learned positions": GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4),
}


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("kind", CONFIGS)
def test_other_architectures_give_their_logits_beyond_a_window_too(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "graph").mkdir()
    make(
        {
            "source": str(tmp_path / "source"),
            "target": str(tmp_path / "graph"),
            "dtype": "float32",
            "threads": 1,
            "trust_remote_code": False,
        }
    )
    code = onnx_snippet(str(tmp_path / "graph"), ends=[2])
    names: dict[str, Any] = {}
    exec("import numpy as np, onnxruntime\n" + code[code.index("session =") : code.index("messages =")], names)
    prompt = torch.randint(3, 500, (40,)).tolist()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([prompt])).logits[0, -8:].numpy()
    assert np.abs(_last_logits(names["forward"], names["empty"], prompt) - wanted).max() < 1e-5


def test_missing_package_is_named_with_the_line_that_installs_it(
    run: Callable[..., Exports],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PACKAGES, "onnx", ("onnx", "onnx_not_there"))
    with pytest.raises(ExportError, match=r"export.onnx needs onnx_not_there: pip install 'finetune-qlora\[onnx\]'"):
        run(tmp_path / "export", "onnx")


def test_compared_logits_went_through_the_cache() -> None:
    calls = []

    def forward(tokens: list[int], past: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        calls.append((len(tokens), past))
        return np.zeros((len(tokens), 5), np.float32), {"seen": np.array(len(tokens))}

    assert _last_logits(forward, {}, list(range(20))).shape == (8, 5)
    assert calls == [(12, {}), (8, {"seen": np.array(12)})]


def test_loss_of_a_row_is_that_of_torch() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 11)).astype(np.float32) * 5
    labels = [-100, -100, 4, -100, 7, 10]
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits[:-1]), torch.tensor(labels[1:]), reduction="sum")
    assert _loss(logits, labels) == [pytest.approx(float(expected), rel=1e-6), 3.0]
