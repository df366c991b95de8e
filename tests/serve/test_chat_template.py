"""Chats are rendered as in training, and tool calls are read out of answers."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.inference.chat import Chat
from finetune.serve.answers import Piece
from finetune.serve.chat_template import parse_tools, render
from finetune.serve.engine import RequestRefused, Token
from finetune.serve.requests import ChatRequest, parse
from finetune.serve.writers import ChatWriter
from tests.fixtures.models import CHATML, make_tokenizer
from tests.fixtures.served import ENDS, Served

QUESTION = [{"role": "user", "content": "Wake me at seven."}]
TOOLS = [{"type": "function", "function": {"name": "wake", "description": "x", "parameters": {}}}]
CALL = '<tool_call>\n{"name": "wake", "arguments": {"at": 7}}\n</tool_call>'


@pytest.fixture(scope="module")
def chat() -> Chat:
    """Shows tools to the model."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    return Chat(tokenizer=tokenizer, ends=ENDS, system=None)


def text_of(chat: Chat, **arguments: Any) -> str:
    return str(chat.tokenizer.decode(render(chat, QUESTION, **{"tools": None, **arguments})))


def test_tools_are_given_to_the_template(chat: Chat) -> None:
    assert text_of(chat, tools=TOOLS).startswith('[{"type": "function", "function": {"name": "wake"')
    assert text_of(chat).startswith("<|im_start|>user\nWake me")


def test_tools_that_the_template_does_not_show_are_refused(tokenizer: Any) -> None:
    with pytest.raises(RequestRefused, match="does not show tools"):
        render(Chat(tokenizer=tokenizer, ends=ENDS, system=None), QUESTION, TOOLS)


def test_system_message_of_the_training_comes_first_unless_there_is_one(chat: Chat) -> None:
    with_system = dataclasses.replace(chat, system="Be short.")
    assert text_of(with_system).startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user")
    own = [{"role": "system", "content": "Be long."}, *QUESTION]
    assert "Be short." not in chat.tokenizer.decode(render(with_system, own, None))


def test_template_that_fails_is_the_requests_fault() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestRefused, match="cannot render these messages: roles must alternate"):
        render(Chat(tokenizer=tokenizer, ends=ENDS, system=None), QUESTION, None)


@pytest.mark.parametrize(
    ("family", "answer", "expected"),
    [
        ("qwen2", f"Gladly.\n{CALL}", ("Gladly.", [{"name": "wake", "arguments": '{"at": 7}'}])),
        ("qwen2", "Gladly.", ("Gladly.", [])),
        ("llama", CALL, (CALL, [])),
    ],
)
def test_calls_are_read_where_transformers_knows_the_family(
    chat: Chat, family: str, answer: str, expected: tuple[str, list[dict[str, str]]]
) -> None:
    model = SimpleNamespace(config=SimpleNamespace(model_type=family))
    tokens = chat.tokenizer.encode(answer, add_special_tokens=False)
    prompt = render(chat, QUESTION, TOOLS)
    text, calls = parse_tools(chat.tokenizer, model, tokens, prompt, answer)
    assert (text.strip(), calls) == expected


def test_calls_are_parts_of_the_message(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.cli.serving.utils import get_response_template

    engine: Any = server.opened.engines[0]
    tokenizer = engine._chat.tokenizer
    qwen = SimpleNamespace(config=SimpleNamespace(model_type="qwen2"))
    monkeypatch.setattr(tokenizer, "response_template", get_response_template(object(), qwen), raising=False)
    request = parse(ChatRequest, {"model": "tiny", "messages": QUESTION, "tools": TOOLS})
    prompt = SimpleNamespace(prompt=engine.render(QUESTION))
    writer = ChatWriter(engine, request, [prompt])  # type: ignore[list-item]
    tokens = [Token(token, "") for token in tokenizer.encode(CALL, add_special_tokens=False)]
    choice = writer.whole(0, Piece(CALL, tokens, "stop"))
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], json.loads(call["function"]["arguments"])) == ("function", {"at": 7})
    assert writer.chunk(0, Piece(CALL[:5], tokens[:5])) is None
    streamed = writer.chunk(0, Piece(CALL[5:], tokens[5:], "stop"))
    assert streamed is not None
    assert streamed["delta"]["tool_calls"][0]["function"] == call["function"]
