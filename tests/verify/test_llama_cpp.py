"""``finetune verify`` against llama.cpp's own server, which another program than this one has written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="needs pip install 'finetune-qlora[gguf]'")
pytest.importorskip("xllamacpp", reason="needs pip install 'finetune-qlora[gguf]'")

import xllamacpp

from finetune.export.gguf.file import write_model
from finetune.inference.chat import Chat
from finetune.verify import Target, verify
from tests.verify.conftest import METRIC, Models


@contextmanager
def llama_cpp(source: Path, file: Path, models: Models) -> Iterator[str]:
    """Serves a dense model as GGUF; gives the server's address."""
    chat = Chat(tokenizer=models.tokenizer, ends=models.ends, system=None)
    write_model(source, file, chat=chat, dtype="f16", name="tiny", threads=1)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_parallel, params.n_ctx, params.verbosity, params.warmup = 1, 512, -1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server


def test_merged_model_as_gguf_passes(verified_run: Path, models: Models, tmp_path: Path) -> None:
    with llama_cpp(verified_run / "export" / "safetensors", tmp_path / "tiny.gguf", models) as url:
        verified = verify(verified_run, Target(url=url), artifact="merged", rows=6)
    verdicts = {check.name: check.verdict for check in verified.checks}
    names = ["chat template", "context", "answers", "end of turn", "greedy", "held-out loss", METRIC]
    assert verdicts == dict.fromkeys(names, "PASS")
    details = {check.name: check.detail for check in verified.checks}
    assert "have the token ids of training" in details["chat template"]


def test_base_as_gguf_is_caught(verified_run: Path, models: Models, loud_base: Path, tmp_path: Path) -> None:
    with llama_cpp(loud_base, tmp_path / "base.gguf", models) as url:
        verified = verify(verified_run, Target(url=url), artifact="merged", rows=3)
    caught = {check.name for check in verified.checks if check.verdict == "DIFFERS"}
    assert {"answers", "held-out loss"} <= caught
