"""Hashes of a row's content, and flags for likely secrets and personal data."""

import hashlib
import json
import re
from typing import Any

from finetune.data.conversation import Conversation
from finetune.data.render import REWRITTEN, THOUGHTS_REMOVED, TRIMMED, WITHOUT_THOUGHTS, Rendered
from finetune.data.thoughts import KEYS

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff]")
EMAIL = re.compile(r"[\w.+-]+@[\w-]+\.[a-zA-Z]{2,}")
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|hf_[A-Za-z]{34}|sk-[A-Za-z0-9_-]{20,}|xox[baprs]-[A-Za-z0-9-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    r"|(?i:\b(?:password|passwd|api[_-]?key|secret)\b\s*[:=]\s*[\"']?(?=[^\s\"']*\d)[^\s\"']{8,})"
)
SECRET_HINTS = (
    *("AKIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "hf_", "sk-", "xox", "PRIVATE KEY", "eyJ", "assw", "ASSW"),
    *("pi_key", "pi-key", "pikey", "PI_KEY", "PI-KEY", "PIKEY", "pi_Key", "piKey", "ecret", "ECRET"),
)
"""Every secret contains one of these; searching for them first is ten times faster than the pattern."""

FLAGS = {
    "control characters": 1,
    "e-mail addresses": 2,
    "likely secrets": 4,
    "control tokens as text": 8,
    "in pieces": 16,
    TRIMMED: 32,
    REWRITTEN: 64,
    THOUGHTS_REMOVED: 128,
    WITHOUT_THOUGHTS: 256,
}


def hash_conversation(conversation: Conversation) -> tuple[int, int, int]:
    """Returns 64-bit hashes of content, prompt and answer; equal rows of different files have equal hashes."""
    if conversation.parts is not None:
        *before, (last, _) = conversation.parts
        prompt = "".join(text for text, _ in before) or last
    else:
        *turns, final = conversation.messages
        prompt = "\x1e".join(_canonical(turn) for turn in turns)
        last = _canonical(final)
    tools = json.dumps(conversation.tools, sort_keys=True) if conversation.tools else ""
    rejected = _canonical(conversation.rejected) if conversation.rejected else ""
    return _hash(f"{prompt}\x1d{last}\x1d{tools}\x1d{rejected}\x1d{conversation.desirable}"), _hash(prompt), _hash(last)


def _canonical(turn: dict[str, Any]) -> str:
    calls = json.dumps(turn["tool_calls"], sort_keys=True) if "tool_calls" in turn else ""
    thought = f"\x1f{turn[KEYS[0]].strip()}" if KEYS[0] in turn else ""
    return f"{turn['role']}\x1f{turn['content'].strip()}{calls}{thought}"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def find_flags(rendered: Rendered) -> int:
    """Returns the ``FLAGS`` of a row, combined."""
    text = rendered.text
    flags = 0
    if not text.replace("\n", "").replace("\t", "").isprintable() and CONTROL_CHARACTERS.search(text):
        flags |= FLAGS["control characters"]
    if "@" in text and EMAIL.search(text):
        flags |= FLAGS["e-mail addresses"]
    if any(hint in text for hint in SECRET_HINTS) and SECRET.search(text):
        flags |= FLAGS["likely secrets"]
    flags |= sum(FLAGS[note] for note in rendered.notes)
    return flags | (FLAGS["control tokens as text"] if rendered.literals else 0)


def redact(text: str) -> str:
    """Replaces likely secrets and e-mail addresses, for pages that are shared."""
    return EMAIL.sub("[e-mail address]", SECRET.sub("[likely secret]", text))
