"""vLLM as a child process: its flags, what it is sent, and what its answers become. A program of its name stands in."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from finetune.cli import main
from finetune.errors import ConfigError, ModelError
from finetune.serve.artifacts import find_artifacts, open_models
from finetune.serve.config import ServeConfig
from finetune.serve.vllm_process import VllmModel, vllm_command
from tests.fixtures.artifacts import Line, Made, make_adapter
from tests.fixtures.served import (
    ENDS,
    Served,
    openai_client,
    post,
    server_process,
    serving,
    wait_until,
    write_adapter_export,
)

FAKE = Path(__file__).parents[1] / "fixtures" / "fake_vllm.py"
QUESTION: Any = [{"role": "user", "content": "Wake me at seven."}]


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """Puts a program named vllm on PATH; gives what it was asked."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "vllm").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    (folder / "vllm").chmod(0o755)
    patch.setenv("PATH", str(folder), prepend=":")
    patch.setenv("FAKE_VLLM_LOG", str(folder / "log"))
    return lambda: [json.loads(line) for line in (folder / "log").read_text().splitlines()]


@pytest.fixture(scope="module")
def plain_run(
    line: Callable[..., Line], adapter: Made, loud_base: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run named tiny whose base is not quantized, and a second adapter below ``others``."""
    root, plain = tmp_path_factory.mktemp("plain"), line("none", dtype="float32")
    write_adapter_export(root / "tiny" / "export" / "adapter", plain, adapter, tokenizer)
    other = make_adapter(loud_base, tmp_path_factory.mktemp("other"), seed=7, size=0.3)
    write_adapter_export(root / "others" / "second", plain, other, tokenizer)
    (root / "tiny" / "model").mkdir()
    manifest = {"product": {"folder": str(loud_base)}}
    (root / "tiny" / "model" / "manifest.json").write_text(json.dumps(manifest))
    return root / "tiny"


@pytest.fixture(scope="module")
def served(plain_run: Path, notes: Callable[[], list[dict[str, Any]]]) -> Iterator[Served]:
    config = ServeConfig(engine="vllm", adapters=plain_run.parent / "others", concurrent=4, cache_mib=64)
    with serving(plain_run, config, "adapter", "base") as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai_client(served) as client:
        yield client


def is_gone(pid: int) -> bool:
    """Returns whether a process has ended; init may not have taken notice yet."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def ask(client: openai.OpenAI, model: str = "tiny", **settings: Any) -> Any:
    return client.chat.completions.create(model=model, messages=QUESTION, **settings)


def prompt_of(tokenizer: Any) -> list[int]:
    rendered = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)
    return list(rendered["input_ids"])


def test_vllm_gets_the_template_as_token_ids_and_its_tokens_become_the_answer(
    client: openai.OpenAI, tokenizer: Any, notes: Callable[[], list[dict[str, Any]]]
) -> None:
    reply, prompt = ask(client, extra_body={"return_token_ids": True}), prompt_of(tokenizer)
    sent = notes()[-1]["body"]
    assert (sent["prompt"], sent["model"], sent["temperature"]) == (prompt, "tiny", 0)
    assert sent["stop_token_ids"] == ENDS
    written = [token for token in prompt if token not in ENDS]
    assert reply.choices[0].token_ids == written
    assert reply.choices[0].message.content == tokenizer.decode(written, skip_special_tokens=True)
    assert reply.choices[0].finish_reason == "stop"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), len(prompt) + 1)


def test_model_chooses_adapter_or_base(client: openai.OpenAI, tokenizer: Any) -> None:
    written = [token for token in prompt_of(tokenizer)[::-1] if token not in ENDS]
    assert [model.id for model in client.models.list()] == ["tiny", "base"]
    assert ask(client, "base").choices[0].message.content == tokenizer.decode(written, skip_special_tokens=True)


def test_stream_has_the_text_of_the_whole_answer(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, max_tokens=9))
    whole = ask(client, max_tokens=9)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert (text, chunks[-1].usage) == (whole.choices[0].message.content, whole.usage)
    assert whole.choices[0].finish_reason == "length"


def test_settings_are_passed_on(client: openai.OpenAI, notes: Callable[[], list[dict[str, Any]]]) -> None:
    ask(
        client, temperature=0.7, top_p=0.5, seed=3, n=2, max_tokens=5, response_format={"type": "json_object"},
        extra_body={"top_k": 9},
    )  # fmt: skip
    sent = [entry["body"] for entry in notes()[-2:]]
    assert sorted(body["seed"] for body in sent) == [3, 4]
    expected = {
        "temperature": 0.7,
        "top_p": 0.5,
        "top_k": 9,
        "max_tokens": 5,
        "response_format": {"type": "json_object"},
    }
    assert all(body[name] == value for body in sent for name, value in expected.items())


def test_logprobs_are_those_of_vllm_with_the_best_first(client: openai.OpenAI, tokenizer: Any) -> None:
    reply = ask(client, logprobs=True, top_logprobs=2, max_tokens=3)
    for token, entry in zip(prompt_of(tokenizer)[:3], reply.choices[0].logprobs.content, strict=True):
        assert (entry.token, entry.logprob) == (tokenizer.decode([token]), -0.5)
        best = [(top.token, top.logprob) for top in entry.top_logprobs]
        assert best == [(tokenizer.decode([token + 1]), -0.4), (tokenizer.decode([token]), -0.5)]


def test_prompt_is_scored(client: openai.OpenAI, tokenizer: Any) -> None:
    ids = tokenizer("The capital of France").input_ids
    reply = client.completions.create(model="base", prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert reply.choices[0].logprobs.token_logprobs == [None, *[-0.5 - place for place in range(1, len(ids))]]


def test_client_that_leaves_stops_its_generation(client: openai.OpenAI, notes: Callable[[], list[Any]]) -> None:
    with ask(client, stream=True, seed=13) as stream:
        next(iter(stream))
    wait_until(lambda: {"aborted": "tiny"} in notes())


def test_adapters_are_loaded_and_dropped_while_it_runs(
    served: Served, plain_run: Path, client: openai.OpenAI, notes: Callable[[], list[dict[str, Any]]]
) -> None:
    adapter = {"lora_name": "other", "lora_path": "second"}
    assert post(served, "/v1/load_lora_adapter", adapter).status_code == 200
    assert notes()[-1]["body"] == {"lora_name": "other", "lora_path": str(plain_run.parent / "others" / "second")}
    assert ask(client, "other").choices[0].message.content
    assert post(served, "/v1/unload_lora_adapter", {"lora_name": "other"}).status_code == 200
    with pytest.raises(openai.NotFoundError, match="the model 'other' is not served here"):
        ask(client, "other")


def test_it_is_started_with_the_flags_of_the_run_and_ends_with_the_server(
    served_run: Path, notes: Callable[[], list[dict[str, Any]]]
) -> None:
    config = ServeConfig(engine="vllm", concurrent=3, cache_mib=32)
    opened = open_models(find_artifacts(served_run), ["merged"], config)
    try:
        started = notes()[-1]
        (engine,) = opened.engines
        assert (engine.names(), engine.context_tokens, engine.is_alive()) == (["tiny"], 256, True)
    finally:
        opened.close()
    merged = str(served_run / "export" / "safetensors")
    flags = dict(zip(started["words"][2:18:2], started["words"][3:19:2], strict=True))
    port = flags.pop("--port")
    assert int(port) > 0
    assert flags == {
        "--host": "127.0.0.1", "--served-model-name": "tiny", "--tokenizer": merged, "--dtype": "float32",
        "--max-model-len": "auto", "--max-num-seqs": "3", "--kv-cache-memory-bytes": str(32 * 2**20),
    }  # fmt: skip
    assert started["words"][:2] == ["serve", merged]
    assert not psutil.pid_exists(started["pid"])


@pytest.mark.parametrize(("rank", "flag"), [(4, "8"), (16, "16"), (300, "320")])
def test_rank_is_the_next_one_that_vllm_has(rank: int, flag: str) -> None:
    model = VllmModel(
        weights=Path("w"), tokenizer=Path("t"), name="base", dtype="bfloat16", adapter=("a", Path("f")), rank=rank
    )
    command = vllm_command(model, ServeConfig(), port=1)
    assert command[-6:] == ["--max-loras", "1", "--max-lora-rank", flag, "--lora-modules", "a=f"]


def test_rank_beyond_vllms_largest_is_refused() -> None:
    model = VllmModel(
        weights=Path("w"), tokenizer=Path("t"), name="base", dtype="bfloat16", adapter=("a", Path("f")), rank=600
    )
    with pytest.raises(ModelError, match="vLLM takes adapters of rank 512 at most; this one has 600"):
        vllm_command(model, ServeConfig(), port=1)


def test_4_bit_base_is_refused_since_vllm_computes_others_weights(served_run: Path, notes: Any) -> None:
    with pytest.raises(ModelError, match="base quantized by nf4, which vLLM does not compute; serve the merged"):
        open_models(find_artifacts(served_run), ["adapter", "base"], ServeConfig(engine="vllm"))


def test_merged_and_adapter_need_two_servers(served_run: Path, notes: Any) -> None:
    with pytest.raises(ConfigError, match="vLLM holds one set of weights"):
        open_models(find_artifacts(served_run), ["adapter", "merged"], ServeConfig(engine="vllm"))


def test_vllm_that_does_not_start_is_named_with_the_end_of_its_log(
    served_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").write_text("#!/bin/sh\necho no GPU here\nexit 1\n")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ModelError, match="vLLM does not start; the end of its log: no GPU here"):
        open_models(find_artifacts(served_run), ["merged"], ServeConfig(engine="vllm"))


def test_missing_vllm_is_one_message_with_the_remedy(
    served_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["serve", str(served_run), "--engine", "vllm"]) == 2
    assert "there is no program vllm on PATH; install it in an environment of its own" in capsys.readouterr().err


def test_killed_vllm_ends_its_answers_with_an_error(plain_run: Path, notes: Callable[[], list[dict[str, Any]]]) -> None:
    with serving(plain_run, ServeConfig(engine="vllm"), "adapter") as served:
        started = next(entry for entry in reversed(notes()) if "pid" in entry)
        psutil.Process(started["pid"]).kill()
        body = {"model": "tiny", "messages": QUESTION}
        reply = post(served, "/v1/chat/completions", body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "engine_error")
        assert httpx.get(f"{served.url}/health", trust_env=False).status_code == 503


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: prctl(PR_SET_PDEATHSIG)")
def test_vllm_ends_where_its_server_is_killed(served_run: Path, notes: Callable[[], list[dict[str, Any]]]) -> None:
    words = ["finetune", "serve", str(served_run), "--engine", "vllm", "--models", "merged"]
    with server_process(words) as served:  # kills it at its end
        started = next(entry for entry in reversed(notes()) if "pid" in entry)
        assert psutil.pid_exists(started["pid"])
        reply = httpx.get(f"{served.url}/v1/models", trust_env=False).json()
        assert [model["id"] for model in reply["data"]] == ["tiny"]
    wait_until(lambda: is_gone(started["pid"]))
