"""Finds the thoughts of reasoning models in rows, and how a chat template takes them.

A row holds thoughts as ``reasoning_content`` (or ``thinking``, ``reasoning``) of a message, or at the beginning of an
answer as ``<think>...</think>``. A template takes them in one of these ways:

- under a key of the message: ``reasoning_content``, ``thinking`` or ``reasoning``;
- `OPENED`: it writes none, but its prompt ends with ``<think>``, so the model writes the rest;
- `INLINE`: it has no notion of thoughts, and ``<think>...</think>`` inside the answer stays there;
- "": it writes none.
"""

import re
from collections.abc import Callable

from finetune.data.conversation import BadRow, Conversation, Message

KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that hold its thought, in data and in templates; the first is the one of `Conversation`."""

SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates turn thoughts on and off."""

INLINE, OPENED = "inline", "opened"
OPENER = re.compile(r"<think>\s*$")
OPEN, CLOSE = "<think>", "</think>"
PROBE_THOUGHT = "Look at the sky first"

KEEP, REMOVE, REFUSE = "keep", "remove", "refuse"
"""What is done with thoughts in rows; `REFUSE` where the run was set up without thoughts because no row seemed to."""

Render = Callable[..., str]


def split_thought(message: Message) -> tuple[str, Message]:
    """Returns a message's thought, "" without one, and the message without it."""
    if message["role"] != "assistant":
        return "", message
    if thought := message.get(KEYS[0]):
        return thought, {name: value for name, value in message.items() if name != KEYS[0]}
    content = message["content"]
    if CLOSE not in content or not content.lstrip().startswith(OPEN):
        return "", message
    before, _, after = content.partition(CLOSE)
    return before.lstrip().removeprefix(OPEN).strip(), {**message, "content": after.lstrip("\n")}


def has_thoughts(conversation: Conversation) -> bool:
    """Returns whether an answer of the conversation has a thought."""
    return any(split_thought(message)[0] for message in conversation.messages)


def with_thought(message: Message, thought: str, form: str) -> Message:
    """Returns the message as the template takes it: with its thought in the template's form.

    Raises:
        BadRow: The template does not write thoughts.
    """
    if not thought or form == OPENED:
        return message
    if form == INLINE:
        return {**message, "content": f"{OPEN}\n{thought}\n{CLOSE}\n\n{message['content']}"}
    if form in KEYS:
        return {**message, form: thought}
    raise BadRow("the chat template does not write thoughts", "data.thinking=drop trains the answers without them")


def find_switch(render: Render, question: list[Message], variables: set[str]) -> str | None:
    """Returns the variable that turns thoughts on and off, by its effect on a prompt."""
    for name in SWITCHES:
        if name in variables:
            on, off = (_attempt(render, question, prompt=True, **{name: value}) for value in (True, False))
            if on != off:
                return name
    return None


def thought_form(render: Render, question: Message, answer: Message, *, has_switch: bool) -> str:
    """Returns how the template takes thoughts."""
    for key in KEYS:
        if PROBE_THOUGHT in _attempt(render, [question, {**answer, key: PROBE_THOUGHT}]):
            return key
    if OPENER.search(_attempt(render, [question], prompt=True)):
        return OPENED
    inline = with_thought(answer, PROBE_THOUGHT, INLINE)
    return INLINE if not has_switch and PROBE_THOUGHT in _attempt(render, [question, inline]) else ""


def complete_thought(prompt: str, text: str, thought: str) -> str | None:
    """Returns the text of a turn whose prompt ends with ``<think>`` where the template then writes something else.

    Templates such as DeepSeek's open a thought in the prompt, and drop it from the finished turn. What serving expects
    after such a prompt is the rest of the thought, its end, and the answer.

    Args:
        prompt: What serving sends.
        text: The rendered turn, which does not begin with the prompt.
        thought: Of this turn; may be "".

    Returns:
        A text that begins with the prompt; None where the two differ elsewhere.
    """
    opener = OPENER.search(prompt)
    if opener is None or not text.startswith(prompt[: opener.start()]):
        return None
    rest = text[opener.start() :].removeprefix(OPEN)
    if CLOSE not in rest:
        rest = f"{thought}\n{CLOSE}\n\n{rest}"
    return prompt + rest


def _attempt(render: Render, messages: list[Message], **arguments: bool) -> str:
    try:
        return render(messages, **arguments)
    except BadRow:
        return ""
