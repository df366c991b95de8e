"""Renders chats as in training, and reads tool calls out of answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.inference.chat import Chat
from finetune.serve.engine import Message, RequestRefused


def render(chat: Chat, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[int]:
    """Returns the token ids of a chat with its generation prompt.

    Adds the system message that the data stage added to conversations without one.

    Raises:
        RequestRefused: There is no template, or it cannot render these messages or tools.
    """
    if not chat.tokenizer.chat_template:
        raise RequestRefused("this model has no chat template; use /v1/completions with a prompt", parameter="messages")
    if chat.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": chat.system}, *messages]
    tokens = _apply(chat.tokenizer, messages, tools)
    if tools and tokens == _apply(chat.tokenizer, messages, None):
        raise RequestRefused("this model's chat template does not show tools to the model", parameter="tools")
    return tokens


def _apply(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[int]:
    from jinja2 import TemplateError

    try:
        encoding = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise RequestRefused(
            f"this model's chat template cannot render these messages: {error}", parameter="messages"
        ) from error
    return list(encoding["input_ids"])


def parse_tools(
    tokenizer: Any, model: Any, tokens: Sequence[int], prompt: Sequence[int], text: str
) -> tuple[str, list[dict[str, str]]]:
    """Separates an answer's text from its tool calls, by the rules that transformers has for the model.

    Returns:
        The text, and ``name`` and ``arguments`` (JSON) of each call. The text as it is, and none, where the tokenizer
        has no ``response_template`` and transformers does not know the family's.
    """
    from transformers.cli.serving.utils import get_response_template

    rules = get_response_template(tokenizer, model)
    if rules is None:
        return text, []
    try:
        parsed = tokenizer.parse_response(list(tokens), rules, prefix=tokenizer.decode(prompt))
    except ValueError:  # a call that is not valid JSON stays text
        return text, []
    calls = [call["function"] for call in parsed.get("tool_calls") or []]
    return parsed.get("content") or "", [
        {"name": call["name"], "arguments": _json_text(call["arguments"])} for call in calls
    ]


def _json_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


class ChatTokens:
    """Chats and texts as token ids and back, by tokenizer and template of the training.

    Args:
        chat: Tokenizer, end tokens and system message of the training.
        model: Has the ``config.model_type`` by which transformers knows how the family writes tool calls.
    """

    def __init__(self, chat: Chat, model: Any) -> None:
        self._chat, self._model = chat, model

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Returns the token ids of a chat with its generation prompt; adds the system message of the training."""
        return render(self._chat, messages, tools)

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of plain text."""
        return list(self._chat.tokenizer(text).input_ids)

    def token_text(self, token: int) -> str:
        """Returns the text of one token."""
        return str(self._chat.tokenizer.decode([token]))

    def parse_tools(self, tokens: Sequence[int], prompt: Sequence[int], text: str) -> tuple[str, list[dict[str, str]]]:
        """Returns an answer's text without its tool calls, and those."""
        return parse_tools(self._chat.tokenizer, self._model, tokens, prompt, text)
