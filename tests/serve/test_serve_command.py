"""``finetune serve``: what it refuses before a model is loaded, and how it ends."""

import json
import signal
import socket
from pathlib import Path

import httpx
import pytest

from finetune.cli import main
from finetune.export.loader import check_gguf
from finetune.serve.config import ServeConfig
from tests.fixtures.served import server_process, wait_until

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.name=missing"], "missing holds no run"),
        (["--host", "0.0.0.0", "run.name=x"], "serve --host 0.0.0.0 is reachable from other machines, so a key is"),
        (["--port", "70000", "run.name=x"], "serve --port must be between 0 and 65535; got 70000"),
        (["--api-key", "with space", "run.name=x"], "serve --api-key must be printable ASCII"),
        (["--models", "best", "run.name=x"], "serve --models must be some of adapter, base, merged, gguf"),
        (["--engine", "ollama", "run.name=x"], "serve --engine must be one of transformers, vllm"),
        (["--adapters", "/nowhere", "run.name=x"], "serve --adapters /nowhere: there is no such folder"),
        (["lora.rank=8", "run.name=x"], "lora.rank=8 would have no effect"),
    ],
)
def test_bad_words_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FINETUNE_API_KEY", raising=False)
    assert main(["serve", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_key_in_the_environment_is_enough_for_another_address(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_API_KEY", "secret")
    assert main(["serve", "--host", "0.0.0.0", "run.name=missing"]) == 2
    assert "a key is required" not in capsys.readouterr().err


def test_unfinished_run_is_named_with_what_is_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("config.yaml", "data/manifest.json", "train/manifest.json"):
        (tmp_path / "half" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "half" / file).write_text("{}")
    assert main(["serve", f"run.root={tmp_path}", "run.name=half"]) == 2
    assert "is an unfinished run, which has no exports (done: data, train)" in capsys.readouterr().err


def test_taken_port_is_refused_before_the_model_is_loaded(served_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(served_run), "--port", str(port)]) == 2
    printed = capsys.readouterr()
    assert f"serve --port {port}: 127.0.0.1 port {port} cannot be used: Address already in use" in printed.err
    assert "hashes" not in printed.out


def test_missing_package_is_named(
    served_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.serve.run.PACKAGES", ("fastapi", "not_installed"))
    assert main(["serve", str(served_run)]) == 2
    assert "serve needs not_installed; run: pip install 'finetune-qlora[serve]'" in capsys.readouterr().err


def test_changed_weights_are_refused(served_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    folder = shutil.copytree(served_run / "export" / "adapter", tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    assert main(["serve", str(folder), "--port", "0"]) == 2
    assert "its weights are not those that were exported" in capsys.readouterr().err


def test_changed_gguf_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from finetune.export.manifest import folder_sha256

    file = tmp_path / "run" / "export" / "gguf_q8_0" / "model.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF")
    exported = {"path": "export/gguf_q8_0", "sha256": folder_sha256(file.parent)}
    manifest = {"product": {"exports": [exported]}}
    (file.parents[1] / "manifest.json").write_text(json.dumps(manifest))
    assert check_gguf(file)
    file.write_bytes(b"GGUX")
    for target in (file.parents[2], file):
        assert main(["serve", str(target), "--port", "0"]) == 2
        assert "model.gguf: its weights are not those that were exported" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "problems"), [("127.0.0.1", 0), ("::1", 0), ("localhost", 0), ("10.0.0.1", 1)])
def test_only_this_machines_own_addresses_need_no_key(host: str, problems: int) -> None:
    assert len(list(ServeConfig(host=host).problems())) == problems


def test_sigterm_finishes_the_running_answer_and_refuses_new_ones(served_run: Path) -> None:
    """A process of its own; no text of a request is in its log."""
    with server_process(["finetune", "serve", str(served_run)]) as served:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Book a secret table."}], "stream": True}
        long = body | {"max_tokens": 400, "n": 8, "temperature": 2, "seed": 1}  # one of them reaches its limit
        with (
            httpx.Client(base_url=served.url, trust_env=False, timeout=60.0) as client,
            client.stream("POST", "/v1/chat/completions", json=long) as response,
        ):
            events = filter(None, response.iter_lines())
            next(events)
            served.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{served.url}/health", trust_env=False).status_code == 503)
            refused = httpx.post(f"{served.url}/v1/chat/completions", json=body, trust_env=False)
            rest_of_answer = list(events)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert rest_of_answer[-1] == "data: [DONE]"
        rest = served.process.communicate()[0]
        assert served.process.wait(30) == 0
        assert "no new requests; 8 running answers are finished" in rest
        assert "secret" not in served.printed + rest
        assert "Traceback" not in rest
