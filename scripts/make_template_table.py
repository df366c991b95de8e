"""Writes the table of docs/templates.md: what becomes of conversations in each chat template.

    python scripts/make_template_table.py

Each original template of the installed trl, and each of ``conf/data/template``, renders the conversations of
``finetune.data.proof_chats`` with a small tokenizer that has the control tokens of the template. Every turn is compared
with what transformers' ``apply_chat_template`` sends and expects. Weights are not needed.
"""

import re
from pathlib import Path
from typing import Any

from finetune.chat_templates import read_template, template_names, trl_templates
from finetune.config import load
from finetune.data.config import DataConfig
from finetune.data.proof_chats import proof_chats
from finetune.data.prove import PASS, ConversationProof, prove_template
from finetune.errors import DataError

PAGE = Path(__file__).parent.parent / "docs" / "templates.md"
HEADING = "## Every template\n"
SPECIAL = re.compile(
    r"<\|[\w:]+\|?>|<\w+\|>|<｜[^｜\s]+｜>|<(?:start|end)_of_\w+>|\[gMASK\]|<sop>|\[/?(?:INST|SYSTEM_PROMPT|TOOL_\w+)\]"
)
"""Control tokens as templates of known families write them."""

ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Tokens of many vocabularies that are not control tokens."""

EOS = {"trl:cohere": "<|END_OF_TURN_TOKEN|>", "trl:cohere2": "<|END_OF_TURN_TOKEN|>"}
"""EOS of the models whose template ends an answer with more than one control token; others: ``</s>``."""

MERGES = (("\u010a", "\u010a"), ("\u0120", "T"), ("T", "h"), ("Th", "e"), ("\u0120", "The"))
"""Of the small tokenizer: two line breaks, `` T`` and `` The``, so that tokens could cross the border of an answer."""


def template_tokenizer(name: str, *, looks_ahead: bool = False) -> Any:
    """Returns a byte-level tokenizer with a template and its control tokens.

    Args:
        looks_ahead: Whether it splits text as GPT-2 does, where the end of a prompt depends on the answer after it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in MERGES)]
    core = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=list(MERGES)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=looks_ahead)
    core.decoder = decoders.ByteLevel()
    source, eos = read_template(name), EOS.get(name, "</s>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    special = dict.fromkeys([*SPECIAL.findall(source), "<s>", eos, "<pad>"])
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.add_tokens([token for token in ADDED if token in source])
    tokenizer.chat_template = source
    return tokenizer


def data_config() -> DataConfig:
    """Returns the data group's own defaults."""
    return load(["run.name=templates", "model=smollm2_135m", "data=custom", "data.path=rows.jsonl"]).data


def proofs(name: str, config: DataConfig) -> list[ConversationProof] | str:
    """Returns the results of a template, or why it cannot be used at all."""
    try:
        return list(prove_template(config, template_tokenizer(name), proof_chats()))
    except DataError as error:
        return str(error).removeprefix("data.template: ")


def cell(proof: ConversationProof) -> str:
    """Returns a result as the table has it, without its reason."""
    if proof.verdict != PASS:
        return proof.verdict.partition(":")[0]
    rows = PASS if proof.rows == 1 else f"{PASS}, {proof.rows} rows"
    return f"{rows}, trimmed" if "trimmed answers" in proof.notes else rows


def section(results: dict[str, list[ConversationProof] | str]) -> str:
    """Returns the table of all templates, and the reasons below it."""
    chats = [name for name, _ in proof_chats()]
    lines = [f"| template | {' | '.join(chats)} |", f"|---{'|---' * len(chats)}|"]
    reasons: dict[str, list[str]] = {}
    for name, result in results.items():
        if isinstance(result, str):
            lines.append(f"| `{name}` | {' | '.join(['refused'] * len(chats))} |")
            reasons.setdefault(result, []).append(name)
            continue
        lines.append(f"| `{name}` | {' | '.join(map(cell, result))} |")
        for proof in result:
            if proof.verdict != PASS:
                reasons.setdefault(proof.verdict.partition(": ")[2], []).append(name)
    usable = sum(not isinstance(result, str) for result in results.values())
    listed = []
    for reason, where in sorted(reasons.items()):
        names = list(dict.fromkeys(where))
        listed.append(f"- {reason}: {'every other' if len(names) == usable else ', '.join(f'`{n}`' for n in names)}")
    return "\n".join([HEADING, *lines, "", "Why conversations are refused:", "", *listed, ""])


def main() -> None:
    """Replaces the section of the page."""
    config = data_config()
    results = {name: proofs(name, config) for name in (*trl_templates(), *template_names())}
    before = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
    PAGE.write_text(before + section(results), encoding="utf-8")


if __name__ == "__main__":
    main()
