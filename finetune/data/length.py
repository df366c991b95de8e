"""Documents longer than ``max_tokens``: what is left of them, and by how much they shrank."""

from collections.abc import Callable

from finetune.data.conversation import BadRow, Conversation, Message
from finetune.data.tokens import Encoded

TRIES = 8
SLACK = 1.05
"""Characters are cut by the mean length of a token; a little more saves a round."""


def fit(
    encoded: Encoded,
    conversation: Conversation,
    *,
    max_tokens: int,
    policy: str,
    again: Callable[[Conversation], Encoded],
) -> tuple[list[Encoded], int]:
    """Applies a policy to a document that is too long.

    Args:
        again: Renders and tokenises a changed conversation.

    Returns:
        The pieces to train on, and the number of tokens that are lost.

    Raises:
        BadRow: Nothing may or can be kept.
    """
    length = len(encoded.ids)
    if policy == "truncate":
        return [_window(encoded, 0, max_tokens)], length - max_tokens
    if policy == "truncate_prompt" and conversation.parts is None:
        shorter = _shorter_prompt(encoded, conversation, max_tokens=max_tokens, again=again)
        return [shorter], length - len(shorter.ids)
    if policy == "truncate_prompt":
        raise BadRow("longer than max_tokens, and raw text has no prompt to cut", f"{length} tokens")
    if policy == "split":
        pieces = (
            _windows(encoded, max_tokens)
            if conversation.parts is not None
            else _exchanges(conversation, max_tokens=max_tokens, again=again)
        )
        return pieces, 0
    raise BadRow("longer than max_tokens", f"{length} tokens")


def _window(encoded: Encoded, start: int, end: int) -> Encoded:
    inside = [(max(a, start) - start, min(b, end) - start) for a, b in encoded.spans if b > start and a < end]
    return Encoded(encoded.ids[start:end], inside, min(max(encoded.answer - start, 0), end - start))


def _windows(encoded: Encoded, max_tokens: int) -> list[Encoded]:
    """Raw text in pieces; each begins with the last token of the one before, so that every token but one is learnt once."""
    pieces: list[Encoded] = []
    start = 0
    while start < len(encoded.ids) - 1 or not pieces:
        pieces.append(_window(encoded, start, min(start + max_tokens, len(encoded.ids))))
        start += max_tokens - 1
    return [piece for piece in pieces if piece.trained]


def _shorter_prompt(
    encoded: Encoded, conversation: Conversation, *, max_tokens: int, again: Callable[[Conversation], Encoded]
) -> Encoded:
    """Cuts the beginning of the longest user or tool message until the whole fits; the answer stays whole."""
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
        encoded = again(Conversation(messages, train=conversation.train, tools=conversation.tools))
    if len(encoded.ids) <= max_tokens:
        return encoded
    raise BadRow("longer than max_tokens even without its prompt", f"{len(encoded.ids)} tokens")


def _exchanges(
    conversation: Conversation, *, max_tokens: int, again: Callable[[Conversation], Encoded]
) -> list[Encoded]:
    """A long conversation as several shorter ones, cut before user turns; the system message is kept in each."""
    system = [message for message in conversation.messages if message["role"] == "system"]
    marks = conversation.train or [None] * len(conversation.messages)
    exchanges: list[list[tuple[Message, bool | None]]] = []
    for message, mark in zip(conversation.messages[len(system) :], marks[len(system) :], strict=True):
        if message["role"] == "user":
            exchanges.append([])
        exchanges[-1].append((message, mark))

    def encode(part: list[tuple[Message, bool | None]]) -> Encoded:
        turns = [message for message, _ in part]
        return again(
            Conversation(
                [*system, *turns], train=marks[: len(system)] + [mark for _, mark in part], tools=conversation.tools
            )
        )

    pieces: list[Encoded] = []
    gathered: list[tuple[Message, bool | None]] = []
    last: Encoded | None = None
    for exchange in exchanges:
        together = encode([*gathered, *exchange])
        if len(together.ids) > max_tokens and gathered:
            pieces += [last] if last else []
            gathered, together = [], encode(exchange)
        if len(together.ids) > max_tokens:
            raise BadRow("longer than max_tokens, in one exchange that cannot be split", f"{len(together.ids)} tokens")
        gathered, last = [*gathered, *exchange], together
    return [*pieces, *([last] if last else [])]
