"""What servers with OpenAI's API have in common, for the server that asks another one and for the check of a server."""

import json

FORCING_BIAS = 10_000.0
"""Added to a token's logit so that llama.cpp writes it; its log-probabilities are computed without it."""


def error_message(body: bytes, *, reason: str) -> str:
    """Returns the message of an error in OpenAI's form, or the beginning of what else was sent.

    Args:
        body: Of the response.
        reason: Of its status line, for an empty body.
    """
    text = body.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text[:200] or reason
