"""Makes a tokenizer of a model's class offline: the class's own rules and control tokens, few merges.

The merges are learned from the texts that the project ships, so that a walk needs no hub.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.architecture import ArchitectureConfig
from finetune.chat_templates import read_template
from finetune.errors import ModelError
from finetune.paths import SHIPPED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMALLEST_VOCABULARY = 1024
LEARNED_TOKENS = 600
"""Learned on top of bytes and control tokens: enough for words of the shipped texts."""


@dataclass(frozen=True, kw_only=True)
class TokenizerKind:
    """What a family's tokenizer has on the hub.

    Attributes:
        name: Class in transformers; ``PreTrainedTokenizerFast`` where the hub names no other.
        control: Control tokens that begin the vocabulary, in order.
        added: Control tokens behind the vocabulary, as later tunings added them.
        roles: Role of a token by transformers' name, e.g. ``eos_token``.
        template: Name, as of ``data.template``, of the template that the hub's tokenizer has;
            empty for a base that has none.
        begins: Whether it puts the begin token in front of every text.
        sentencepiece: Whether spaces are written as a visible mark and unknown characters as bytes.
    """

    name: str
    control: tuple[str, ...]
    added: tuple[str, ...] = ()
    roles: dict[str, str]
    template: str = ""
    begins: bool = False
    sentencepiece: bool = False


LLAMA = TokenizerKind(
    name="LlamaTokenizer",
    control=("<unk>", "<s>", "</s>"),
    roles={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    begins=True,
    sentencepiece=True,
)
PHI3 = TokenizerKind(
    name="LlamaTokenizer",
    control=("<unk>", "<s>", "</s>"),
    added=("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
    roles={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    template="trl:phi3",
    sentencepiece=True,
)
LLAMA3 = TokenizerKind(
    name="PreTrainedTokenizerFast",
    control=(),
    added=(
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>",
        "<|end_header_id|>", "<|eot_id|>",
    ),
    roles={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    begins=True,
)  # fmt: skip
LLAMA3_INSTRUCT = TokenizerKind(
    name=LLAMA3.name,
    control=(),
    added=LLAMA3.added,
    roles={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    template="llama3",
    begins=True,
)
SMOLLM2 = TokenizerKind(
    name="GPT2Tokenizer",
    control=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    roles={
        "unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
    },
    template="smollm2",
)  # fmt: skip
QWEN = TokenizerKind(
    name="Qwen2Tokenizer",
    control=(),
    added=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    roles={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    template="trl:qwen2_5",
)
GEMMA = TokenizerKind(
    name="GemmaTokenizer",
    control=("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
    roles={"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
    begins=True,
    sentencepiece=True,
)
GEMMA4 = TokenizerKind(
    name="GemmaTokenizer",
    control=(
        "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>",
        "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
    ),
    roles={"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"},
    template="trl:gemma4_v5",
    begins=True,
    sentencepiece=True,
)  # fmt: skip
GPT_OSS = TokenizerKind(
    name="PreTrainedTokenizerFast",
    control=(),
    added=(
        "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
        "<|message|>", "<|call|>",
    ),
    roles={"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
    template="trl:gptoss",
)  # fmt: skip
KINDS = {
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "ministral3": dataclasses.replace(LLAMA, template="mistral"),
    "phi3": PHI3,
    "qwen2": QWEN,
    "qwen3": QWEN,
    "qwen3_moe": QWEN,
    "qwen3_5_text": QWEN,
    "qwen3_5_moe_text": QWEN,
    "smollm3": SMOLLM2,
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "gpt_oss": GPT_OSS,
    "gemma3_text": dataclasses.replace(GEMMA, template="gemma"),
}
"""By family, besides llama. On the hub SmolLM3 has other control tokens and Ministral 3 another vocabulary; a walk
needs tokens of that form only."""


def kind_of(name: str, architecture: ArchitectureConfig) -> TokenizerKind:
    """Returns the kind of tokenizer of a model.

    Args:
        name: Of the model on the hub: instruct variants have a template that their bases lack.
        architecture: Family and vocabulary tell the generations of Llama apart.

    Raises:
        ModelError: The family's tokenizer is not known here.
    """
    family = architecture.family
    if family == "llama":
        if architecture.vocab_size > 100_000:
            return LLAMA3_INSTRUCT if "instruct" in name.lower() else LLAMA3
        return SMOLLM2 if architecture.vocab_size == 49152 else LLAMA
    if family not in KINDS:
        raise ModelError(
            f"benchmarks.walk: no tokenizer is known for {family} models; known are llama, {', '.join(KINDS)}"
        )
    return KINDS[family]


def make_tokenizer(kind: TokenizerKind, *, model_max_length: int) -> PreTrainedTokenizerBase:
    """Makes a tokenizer of a kind, with a vocabulary of at most `SMALLEST_VOCABULARY` tokens.

    Args:
        kind: Class, control tokens and template.
        model_max_length: Longest sequence of the model in tokens.
    """
    import transformers

    vocabulary, merges = _learn(kind)
    if kind.name == "PreTrainedTokenizerFast":
        arguments: dict[str, Any] = {"tokenizer_object": _llama3(vocabulary, merges)}
    else:
        arguments = {"vocab": vocabulary, "merges": merges}
    cls = getattr(transformers, kind.name)
    tokenizer: PreTrainedTokenizerBase = cls(**arguments, **kind.roles, model_max_length=model_max_length)
    tokenizer.add_special_tokens({"additional_special_tokens": [*kind.control, *kind.added]})
    if kind.begins:
        _begin_text(tokenizer)
    if kind.template:
        tokenizer.chat_template = read_template(kind.template)
    return tokenizer


def _learn(kind: TokenizerKind) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learns merges from the shipped texts; returns the vocabulary with its ids, and the merges in order."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    alphabet: list[str] = []
    if kind.sentencepiece:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
        first = [*kind.control, *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet, first = sorted(pre_tokenizers.ByteLevel.alphabet()), list(kind.control)
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNED_TOKENS, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    raw.train_from_iterator(_texts(), trainer)
    model = json.loads(raw.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].__getitem__)
    vocabulary = {token: index for index, token in enumerate([*first, *learned])}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return vocabulary, [(left, right) for left, right in pairs]


def _llama3(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    from finetune.export.gguf.vocabulary import CASELESS, REST, WORDS

    split = Regex(CASELESS + WORDS + r"|\p{N}{1,3}" + REST)  # its tokenizer.json on the hub; "llama-bpe" in llama.cpp
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    return raw


def _begin_text(tokenizer: Any) -> None:
    """Puts the begin token in front of every text, as the tokenizers of Llama, Mistral and Gemma on the hub do."""
    from tokenizers.processors import TemplateProcessing

    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.bos_token_id)]
    )


def _texts() -> list[str]:
    return [file.read_text(encoding="utf-8") for file in (SHIPPED / "general.txt", SHIPPED / "quickstart/train.jsonl")]
