"""Writes a tokenizer in llama.cpp's form: tokens, merges, pre-tokenizer, and special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, TokenType

from finetune.errors import ExportError

if TYPE_CHECKING:
    from finetune.inference.chat import Chat

DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PRETOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((CASELESS + WORDS + r"|\p{N}" + REST,), False): "qwen2",
    ((CASELESS + WORDS + r"|\p{N}{1,3}" + REST,), False): "dbrx",
    ((CASELESS + WORDS + r"|\p{N}{1,3}" + REST,), True): "llama-bpe",
    ((CASED[0] + CASED[1] + r"|\p{N}" + SLASHED,), True): "tekken",
    ((f"{CASED[0]}{CASELESS}?{CASED[1]}{CASELESS}?" + r"|\p{N}{1,3}" + SLASHED,), False): "gpt-4o",
}
"""llama.cpp's name of a pre-tokenizer, by the patterns of tokenizer.json and by ``ignore_merges`` (whether a piece that
is a token is taken without merging). Source: llama.cpp build 11549, src/llama-vocab.cpp."""

UNMERGED_SCORE = -1e9
"""Score of a token that no merge produces."""


def write_vocabulary(writer: GGUFWriter, chat: Chat, *, rows: int) -> list[str]:
    """Writes the tokenizer, its template, and its beginning, end and padding tokens.

    Args:
        writer: Of the file.
        chat: Tokenizer, and all tokens that end an answer.
        rows: Of the embedding. Rows beyond the tokens get unused tokens.

    Returns:
        One sentence for each difference in llama.cpp.

    Raises:
        ExportError: llama.cpp has no tokenizer that works like this one.
    """
    tokenizer, parts = chat.tokenizer, check_tokenizer(chat.tokenizer)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in parts["model"]["merges"]]
    tokens, types = _tokens(parts, rows=rows)
    differences = []
    if parts["model"].get("byte_fallback"):
        begins = tokenizer.chat_template is not None and _chat_begins_with_control(tokenizer)
        differences += _write_sentencepiece(writer, parts, tokens=tokens, merges=merges, begins_with_control=begins)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pretokenizer(parts))
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_types(types)
    _write_special_tokens(writer, chat)
    steps = _flatten(parts["normalizer"], "normalizers")
    forms = [step["type"] for step in steps if step["type"].startswith("NF")]
    if forms:
        differences.append(f"the tokenizer normalizes text to Unicode form {forms[0]} and llama.cpp does not")
    return differences


def check_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Returns the parts of a tokenizer that llama.cpp has too.

    Raises:
        ExportError: llama.cpp has no tokenizer that works like this one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"GGUF export reads tokenizer.json, and {type(tokenizer).__name__} has none: save it as a fast tokenizer"
        )
    parts: dict[str, Any] = json.loads(backend.to_str())
    if parts["model"]["type"] != "BPE":
        raise ExportError(
            f"GGUF export knows BPE tokenizers, byte-level or SentencePiece; this one is {parts['model']['type']}"
        )
    if not parts["model"].get("byte_fallback"):
        _pretokenizer(parts)
    return parts


def _tokens(parts: dict[str, Any], *, rows: int) -> tuple[list[str], list[TokenType]]:
    """Returns text and type of each id."""
    ids = {index: (text, _token_type(text, parts["model"])) for text, index in parts["model"]["vocab"].items()}
    for token in parts["added_tokens"]:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        ids[token["id"]] = (token["content"], kind)
    if max(ids) >= rows:
        raise ExportError(
            f"the tokenizer has ids up to {max(ids)} and the embedding {rows} rows: "
            "those beyond cannot be written as GGUF"
        )
    entries = [ids.get(index, (f"[PAD{index}]", TokenType.UNUSED)) for index in range(rows)]
    return [text for text, _ in entries], [kind for _, kind in entries]


def _token_type(text: str, model: dict[str, Any]) -> TokenType:
    if text == model.get("unk_token"):
        return TokenType.UNKNOWN
    is_byte = model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _pretokenizer(parts: dict[str, Any]) -> str:
    patterns = tuple(_patterns(_flatten(parts["pre_tokenizer"], "pretokenizers")))
    ignores = bool(parts["model"].get("ignore_merges"))
    if (patterns, ignores) not in PRETOKENIZERS:
        raise ExportError(
            "GGUF export has no llama.cpp name for a tokenizer that splits text by "
            f"{' then '.join(patterns) or 'nothing'} (ignore_merges={ignores})"
        )
    return PRETOKENIZERS[patterns, ignores]


def _patterns(steps: Sequence[dict[str, Any]]) -> Iterator[str]:
    for step in steps:
        if step["type"] == "Split":
            yield str(step["pattern"].get("Regex") or step["pattern"].get("String"))
        elif step["type"] == "Digits":
            yield DIGIT if step["individual_digits"] else r"\p{N}+"
        elif step["type"] == "ByteLevel":
            if step["add_prefix_space"]:
                yield "a space in front"
            if step["use_regex"]:
                yield GPT2
        else:
            yield step["type"]


def _flatten(step: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for child in step[children] for inner in _flatten(child, children)]


def _write_sentencepiece(
    writer: GGUFWriter,
    parts: dict[str, Any],
    *,
    tokens: list[str],
    merges: list[tuple[str, ...]],
    begins_with_control: bool,
) -> list[str]:
    """Derives scores from the order of the merges: llama.cpp merges the pair whose result has the highest score.

    llama.cpp's space prefix goes in front of text at the beginning and after every control token. A tokenizer that puts
    it in front of the first text only is the same in chats that begin with a control token if there is none at all.

    Returns:
        One sentence for each difference in llama.cpp.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    steps = [*_flatten(parts["normalizer"], "normalizers"), *_flatten(parts["pre_tokenizer"], "pretokenizers")]
    schemes = {"always" if step["type"] == "Prepend" else step.get("prepend_scheme", "never") for step in steps}
    without_prefix = "first" in schemes and begins_with_control
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(ranks[text]) if text in ranks else UNMERGED_SCORE for text in tokens])
    writer.add_add_space_prefix(schemes != {"never"} and not without_prefix)
    return ["text outside chats begins without the space that the tokenizer puts in front"] if without_prefix else []


def _write_special_tokens(writer: GGUFWriter, chat: Chat) -> None:
    tokenizer, template = chat.tokenizer, chat.tokenizer.chat_template
    others = [end for end in chat.ends if end != tokenizer.eos_token_id]
    for index, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (others[0] if others else None, writer.add_eot_token_id),
        (others[1] if others[1:] else None, writer.add_eom_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)
    if isinstance(template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
    elif template:
        writer.add_chat_template(template)


def _chat_begins_with_control(tokenizer: Any) -> bool:
    chat = str(tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))
    return chat.startswith(tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special))


def adds_bos(tokenizer: Any) -> bool:
    """Returns whether llama.cpp must add a BOS token: the tokenizer adds one and chats begin with it."""
    if tokenizer.bos_token_id is None or tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        return False
    if not tokenizer.chat_template:
        return True
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    return str(chat).startswith(tokenizer.bos_token)
