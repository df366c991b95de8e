"""A run's GGUF behind the same server: llama.cpp answers as the merged model, with the same template."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

pytest.importorskip("gguf", reason="needs pip install 'finetune-qlora[gguf]'")
pytest.importorskip("xllamacpp", reason="needs pip install 'finetune-qlora[gguf]'")


from finetune.inference.chat import Chat
from finetune.serve.config import ServeConfig
from finetune.serve.llama_engine import LlamaEngine
from finetune.serve.requests import ChatRequest, parse
from tests.fixtures.served import ENDS, Served, openai_client, post, serving

TOOLS: Any = [{"type": "function", "function": {"name": "wake", "description": "x", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "wake", "arguments": {"at": 7}}\n</tool_call>'
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
    with openai_client(served) as client:
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


def test_prompt_has_the_logprobs_of_the_merged_model(served: Served, server: Served) -> None:
    body = {"prompt": "Wake me at seven on Monday.", "max_tokens": 0, "echo": True, "logprobs": 2}
    given, expected = (
        post(one, "/v1/completions", body | {"model": model}).json()["choices"][0]["logprobs"]
        for one, model in ((served, "tiny"), (server, "merged"))
    )
    assert given["tokens"] == expected["tokens"]
    assert given["token_logprobs"][0] is None
    assert given["token_logprobs"][1:] == pytest.approx(expected["token_logprobs"][1:], abs=0.02)
    assert [list(top) for top in given["top_logprobs"][1:]] == [list(top) for top in expected["top_logprobs"][1:]]


def test_file_alone_takes_no_tools(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools need the tokenizer of the training"):
        ask(client, tools=TOOLS)


@pytest.fixture(scope="module")
def engine(served_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    """llama.cpp with a template that shows tools, and the rules of Qwen to read calls."""
    from transformers import AutoTokenizer
    from transformers.cli.serving.utils import get_response_template

    from finetune.export.gguf.file import write_model

    source, file = served_run / "export" / "safetensors", tmp_path_factory.mktemp("tools") / "tiny.gguf"
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + tokenizer.chat_template
    qwen: Any = SimpleNamespace(config=SimpleNamespace(model_type="qwen2"))
    tokenizer.response_template = get_response_template(object(), qwen)
    chat = Chat(tokenizer=tokenizer, ends=ENDS, system=None)
    write_model(source, file, chat=chat, dtype="f16", name="tiny", threads=1)
    engine = LlamaEngine(file, name="tiny", chat=chat, concurrent=1, context_tokens=512, threads=1)
    yield engine
    engine.close()


def test_tools_are_shown_and_calls_are_read(engine: LlamaEngine) -> None:
    prompt = engine.render(QUESTION, TOOLS)
    assert '"name": "wake"' in "".join(map(engine.token_text, prompt)).replace('":"', '": "')
    text, calls = engine.parse_tools(engine.tokenize(f"Gladly.\n{CALL}"), prompt, CALL)
    assert (text.strip(), calls) == ("Gladly.", [{"name": "wake", "arguments": '{"at": 7}'}])
    assert engine._family.config.model_type == "llama"


def test_every_token_of_an_answer_with_tools_is_reported(served: Served) -> None:
    request = parse(ChatRequest, {"model": "tiny", "messages": QUESTION, "tools": TOOLS, "max_tokens": 3})

    async def sampling() -> list[bool]:
        engine = served.opened.engines[0]
        return [answer.generation.sampling.every_token for answer in served.service.answers(engine, "", [[1]], request)]

    assert asyncio.run(sampling()) == [True]
