"""Alpaca: ``{"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], ...]}``."""

from collections.abc import Mapping
from typing import Any

from finetune.data.conversation import BadRow, Conversation
from finetune.data.formats.fields import as_list, as_text, optional_text, system_of, text_of


def read(row: Mapping[str, Any]) -> Conversation:
    messages = system_of(row)
    for number, pair in enumerate(as_list(row.get("history") or [], where="'history'"), 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("an entry of 'history' is not a question and its answer", f"entry {number}")
        question, answer = (as_text(side, where="an entry of 'history'") for side in pair)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    instruction, extra = text_of(row, "instruction"), optional_text(row, "input")
    prompt = f"{instruction}\n\n{extra}" if extra.strip() and instruction.strip() else instruction or extra
    if not prompt.strip():
        raise BadRow("the instruction is empty")
    output = text_of(row, "output")
    return Conversation([*messages, {"role": "user", "content": prompt}, {"role": "assistant", "content": output}])
