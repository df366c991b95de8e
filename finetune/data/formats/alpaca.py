"""Alpaca: ``{"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], ...]}``."""

from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Conversation
from finetune.data.formats.fields import as_list, as_text, optional_text, require_text, system_message


def read(row: Mapping[str, Any]) -> Conversation:
    """Reads one row."""
    messages = system_message(row)
    for number, pair in enumerate(as_list(row.get("history") or [], where="'history'"), 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("an entry of 'history' is not a question and its answer", f"entry {number}")
        question, answer = (as_text(side, where="an entry of 'history'") for side in pair)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    instruction, extra = require_text(row, "instruction"), optional_text(row, "input")
    prompt = f"{instruction}\n\n{extra}" if extra.strip() and instruction.strip() else instruction or extra
    if not prompt.strip():
        raise BadRow("the instruction is empty")
    output = require_text(row, "output")
    return Conversation([*messages, {"role": "user", "content": prompt}, {"role": "assistant", "content": output}])
