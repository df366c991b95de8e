"""Puts the turns of a conversation into rows of their own where their tokens depend on what follows.

Serving tokenizes a prompt on its own. Where the answer would change the tokens at the end of its prompt, a row holds
both tokenized apart. As a part of a later prompt the same text is tokenized as a whole, so one row cannot hold both.
"""

from finetune.data.conversation import BadRow
from finetune.data.encoder import Encoded, Encoder
from finetune.data.render import Rendered, Renderer


def must_be_apart(rendered: Rendered, encoded: Encoded) -> bool:
    """Returns whether the trained turns of a text need a row each."""
    one = rendered.conversation.parts is not None or len(rendered.spans) == 1
    return encoded.in_pieces and not one and not rendered.literals


def encode_apart(rendered: Rendered, renderer: Renderer, encoder: Encoder) -> list[tuple[Rendered, Encoded | BadRow]]:
    """Renders and encodes each trained turn of a text on its own; the last turn is first."""
    texts = renderer.render(rendered.conversation, apart=True)
    return list(zip(texts, encoder.encode(texts), strict=True))
