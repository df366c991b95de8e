"""`finetune bench serve`: who is measured, what a ratio compares, and what the clients notice."""

import asyncio
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

pytest.importorskip("httpx", reason="needs pip install 'finetune-qlora[serve]'")

from finetune.bench import serve
from finetune.bench.load import Load, LoadResult, measure_load
from finetune.errors import ConfigError
from finetune.serve.artifacts import Artifacts

Answer = Callable[[str, int], str | None]


@pytest.fixture
def ask() -> Iterator[Callable[[Answer], LoadResult]]:
    """Measures a server that answers each question by a function of the question and of the number of requests."""
    servers: list[ThreadingHTTPServer] = []

    def measure(answer: Answer) -> LoadResult:
        count = iter(range(10**6))

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = answer(body["messages"][0]["content"], next(count))
                self.send_response(500 if text is None else 200)
                self.end_headers()
                for word in (text or "").split():
                    event = {"choices": [{"delta": {"content": f"{word} "}}]}
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        questions = [[{"role": "user", "content": f"Tell me about {topic}."}] for topic in ("rivers", "Rome", "rain")]
        load = Load(url=url, model="x", questions=questions, clients=3, seconds=0.3, max_tokens=4, pid=1)
        return asyncio.run(measure_load(load))

    yield measure
    for server in servers:
        server.shutdown()


def test_equal_answers_are_counted_with_their_tokens(ask: Callable[[Answer], LoadResult]) -> None:
    result = ask(lambda question, _: f"about {question}")
    assert result.answers == result.equal > 3
    assert (result.mixed_up, result.rounded, result.errors) == (0, 0, [])
    assert result.tokens_per_second > 0
    assert result.first_token_seconds is not None


def test_the_answer_to_another_question_is_mixed_up(ask: Callable[[Answer], LoadResult]) -> None:
    """Alone each gets its own; under load all get the first client's."""
    result = ask(lambda question, number: f"{question[8:]} yes" if number < 3 else "about rivers. yes")
    assert result.mixed_up > 0
    assert result.equal > 0


def test_an_answer_that_departs_late_is_rounding(ask: Callable[[Answer], LoadResult]) -> None:
    result = ask(lambda question, number: f"{question[8:]} {'yes' if number < 3 else 'no'}")
    assert (result.mixed_up, result.equal) == (0, 0)
    assert result.rounded > 0


def test_errors_are_counted(ask: Callable[[Answer], LoadResult]) -> None:
    result = ask(lambda question, number: question if number < 3 else None)
    assert result.answers == 0 or result.errors
    assert "500" in result.errors[0]


def test_each_model_of_a_run_is_measured_next_to_the_servers_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", {"vllm": "/x/vllm"}.get)
    (tmp_path / "finetune.json").write_text('{"computation": {"dtype": "float32"}}')
    found = serve.contenders(tmp_path, Artifacts(name="first", adapter=tmp_path, merged=tmp_path, gguf=tmp_path))
    assert list(found) == [
        "finetune serve, adapter", "finetune serve, merged", "finetune serve, gguf", "transformers serve",
        "vllm serve", "llama.cpp's server",
    ]  # fmt: skip
    assert found["transformers serve"].command[-4:] == ["--dtype", "float32", "--cb-max-memory-percent", "0.2"]
    assert found["finetune serve, merged"].command[-2:] == ["--models", "merged"]
    assert found["vllm serve"].command[-2:] == ["--dtype", "float32"]
    monkeypatch.setattr(shutil, "which", {}.get)
    assert "vllm serve" not in serve.contenders(tmp_path, Artifacts(name="first", merged=tmp_path))
    only = serve.contenders(tmp_path, Artifacts(name="first", gguf=tmp_path))
    assert list(only) == ["finetune serve, gguf", "llama.cpp's server"]


def test_a_run_is_asked_its_heldout_chats_and_a_file_anything(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "35 yen in rupees"}]
    rows = {"chat": [json.dumps({"messages": chat})], "reference": ["{}"]}
    Dataset.from_dict(rows).save_to_disk(str(tmp_path / "data" / "heldout"))
    assert serve.questions(tmp_path) == [chat]
    assert len(serve.questions(tmp_path / "data")) == 10


def test_a_ratio_compares_servers_of_the_same_model() -> None:
    def result(speed: float) -> LoadResult:
        return LoadResult(1, 1, 0, 0, [], 1.0, speed, 1.0, 1, 1)

    results = {"finetune serve, gguf": result(6.0), "llama.cpp's server": result(3.0), "transformers serve": result(0)}
    assert serve.ratios(results) == {"llama.cpp's server": 2.0}


def test_a_server_that_ends_is_named_with_its_words() -> None:
    contender = serve.Contender(command=[sys.executable, "-c", "raise SystemExit('no model here')"], model="x")
    starting = serve.started("transformers serve", contender)
    with pytest.raises(ConfigError, match="bench serve: transformers serve does not start: no model here"), starting:
        pass
