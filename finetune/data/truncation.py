"""Shortens or splits documents that are longer than ``data.max_tokens``."""

from collections.abc import Callable

from finetune.data.conversation import BadRow, Conversation, Message
from finetune.data.encoder import Encoded

TRIES = 8
SLACK = 1.05
"""Characters are cut by the mean length of a token; cutting a little more saves an attempt."""

Encode = Callable[[Conversation], Encoded]


def shorten(
    encoded: Encoded, conversation: Conversation, *, max_tokens: int, policy: str, encode: Encode
) -> tuple[list[Encoded], int]:
    """Applies ``data.too_long`` to a document that is too long.

    Args:
        encode: Renders and tokenizes a changed conversation.

    Returns:
        The pieces to train on, and the number of lost tokens.

    Raises:
        BadRow: The document is to be dropped, or cannot be shortened.
    """
    length = len(encoded.ids)
    if policy == "truncate":
        return [_window(encoded, 0, max_tokens)], length - max_tokens
    if policy == "truncate_prompt" and conversation.parts is None:
        shorter = _shorten_prompt(encoded, conversation, max_tokens=max_tokens, encode=encode)
        return [shorter], length - len(shorter.ids)
    if policy == "truncate_prompt":
        raise BadRow("longer than max_tokens, and raw text has no prompt to cut", f"{length} tokens")
    if policy == "split" and conversation.parts is not None:
        return _split_text(encoded, max_tokens), 0
    if policy == "split":
        return _split_conversation(conversation, max_tokens=max_tokens, encode=encode), 0
    raise BadRow("longer than max_tokens", f"{length} tokens")


def _window(encoded: Encoded, start: int, end: int) -> Encoded:
    inside = [(max(a, start) - start, min(b, end) - start) for a, b in encoded.spans if b > start and a < end]
    return Encoded(encoded.ids[start:end], inside, min(max(encoded.answer - start, 0), end - start))


def _split_text(encoded: Encoded, max_tokens: int) -> list[Encoded]:
    """Splits raw text. Pieces share one token, so that every token but the first is trained on exactly once."""
    pieces: list[Encoded] = []
    start = 0
    while start < len(encoded.ids) - 1 or not pieces:
        pieces.append(_window(encoded, start, min(start + max_tokens, len(encoded.ids))))
        start += max_tokens - 1
    return [piece for piece in pieces if piece.trained_tokens]


def _shorten_prompt(encoded: Encoded, conversation: Conversation, *, max_tokens: int, encode: Encode) -> Encoded:
    """Cuts the beginning of the longest user or tool message until the document fits; the answer stays complete."""
    messages = [dict(message) for message in conversation.messages]
    for _ in range(TRIES):
        excess = len(encoded.ids) - max_tokens
        if excess <= 0:
            return encoded
        longest = max((m for m in messages if m["role"] in ("user", "tool")), key=lambda m: len(m["content"]))
        characters = sum(len(message["content"]) for message in messages)
        cut = max(1, int(excess * SLACK * characters / len(encoded.ids)))
        if cut >= len(longest["content"]):
            break
        longest["content"] = longest["content"][cut:]
        encoded = encode(Conversation(messages, train=conversation.train, tools=conversation.tools))
    if len(encoded.ids) <= max_tokens:
        return encoded
    raise BadRow("longer than max_tokens even without its prompt", f"{len(encoded.ids)} tokens")


def _split_conversation(conversation: Conversation, *, max_tokens: int, encode: Encode) -> list[Encoded]:
    """Splits a conversation before user turns; every part keeps the system message."""
    system = [message for message in conversation.messages if message["role"] == "system"]
    marks = conversation.train or [None] * len(conversation.messages)
    exchanges: list[list[tuple[Message, bool | None]]] = []
    for message, mark in zip(conversation.messages[len(system) :], marks[len(system) :], strict=True):
        if message["role"] == "user":
            exchanges.append([])
        exchanges[-1].append((message, mark))

    def encode_part(part: list[tuple[Message, bool | None]]) -> Encoded:
        turns = [*system, *(message for message, _ in part)]
        train = marks[: len(system)] + [mark for _, mark in part]
        return encode(Conversation(turns, train=train, tools=conversation.tools))

    pieces: list[Encoded] = []
    part: list[tuple[Message, bool | None]] = []
    encoded: Encoded | None = None
    for exchange in exchanges:
        longer = encode_part([*part, *exchange])
        if len(longer.ids) > max_tokens and part:
            pieces += [encoded] if encoded else []
            part, longer = [], encode_part(exchange)
        if len(longer.ids) > max_tokens:
            raise BadRow("longer than max_tokens, in one exchange that cannot be split", f"{len(longer.ids)} tokens")
        part, encoded = [*part, *exchange], longer
    pieces += [encoded] if encoded else []
    return [piece for piece in pieces if piece.trained_tokens] or pieces
