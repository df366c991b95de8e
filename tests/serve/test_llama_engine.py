"""A run's GGUF behind the same server: llama.cpp answers as the merged model, with the same template."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

pytest.importorskip("gguf", reason="needs pip install 'finetune-qlora[gguf]'")
pytest.importorskip("xllamacpp", reason="needs pip install 'finetune-qlora[gguf]'")

import httpx

from finetune.inference.chat import Chat
from finetune.serve.config import ServeConfig
from tests.fixtures.served import ENDS, Served, post, serving

QUESTION: Any = [{"role": "user", "content": "Wake me at seven on Monday, please."}]


@pytest.fixture(scope="module")
def gguf(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    from finetune.export.gguf.file import write_model

    source, file = served_run / "export" / "safetensors", tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    chat = Chat(tokenizer=AutoTokenizer.from_pretrained(source), ends=ENDS, system=None)
    write_model(source, file, chat=chat, dtype="f16", name="tiny", threads=1)
    return file


@pytest.fixture(scope="module")
def served(gguf: Path) -> Iterator[Served]:
    with serving(gguf, ServeConfig(), "gguf") as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="unused", max_retries=0, http_client=httpx.Client(trust_env=False)
    ) as client:
        yield client


def ask(client: openai.OpenAI, model: str = "tiny", **settings: Any) -> Any:
    return client.chat.completions.create(model=model, messages=QUESTION, **{"max_tokens": 12, **settings})


def test_tokens_of_a_chat_are_those_of_transformers(served: Served, server: Served) -> None:
    replies = [post(one, "/tokenize", {"model": "tiny", "messages": QUESTION}).json() for one in (served, server)]
    assert replies[0]["tokens"] == replies[1]["tokens"]


def test_llama_cpp_answers_as_the_merged_model(client: openai.OpenAI, server: Served) -> None:
    reply = ask(client, logprobs=True, top_logprobs=2)
    body = {"model": "merged", "messages": QUESTION, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    merged = post(server, "/v1/chat/completions", body).json()["choices"][0]
    assert reply.choices[0].message.content == merged["message"]["content"]
    given, expected = reply.choices[0].logprobs.content, merged["logprobs"]["content"]
    assert [entry.token for entry in given] == [entry["token"] for entry in expected]
    scored = [(one, other) for one, other in zip(given, expected, strict=True) if one.logprob is not None]
    assert len(scored) > 6, "all but tokens that are a part of a character"
    for one, other in scored:
        assert one.logprob == pytest.approx(other["logprob"], abs=0.02)
        assert len(one.top_logprobs) == 2


def test_stream_has_the_text_of_the_whole_answer(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    whole = ask(client)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert (text, chunks[-1].usage) == (whole.choices[0].message.content, whole.usage)


def test_a_seed_repeats(client: openai.OpenAI) -> None:
    texts = [ask(client, temperature=1.0, seed=seed).choices[0].message.content for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_json_object_is_kept(client: openai.OpenAI) -> None:
    """A random model does not end its object within the limit, but begins one."""
    reply = ask(client, response_format={"type": "json_object"}, temperature=1.0, seed=1)
    assert reply.choices[0].message.content.lstrip().startswith("{")


def test_prompt_is_not_scored(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="which does not score a prompt"):
        client.completions.create(model="tiny", prompt="Hello", max_tokens=0, echo=True, logprobs=1)
