"""Each architecture and each kind of tokenizer gives in llama.cpp what it gives in transformers."""

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.walk_tokenizer import LLAMA, SMALLEST_VOCABULARY, make_tokenizer
from finetune.errors import ExportError
from finetune.inference.chat import Chat

pytest.importorskip("gguf", reason="needs pip install 'finetune-qlora[gguf]'")
pytest.importorskip("xllamacpp", reason="needs pip install 'finetune-qlora[gguf]'")

from finetune.export.gguf import vocabulary
from finetune.export.gguf.file import write_model
from finetune.export.gguf.library import BATCH, LlamaModel, load_library

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# fmt: off
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, own head, biases": ("llama", {"attention_bias": True, "mlp_bias": False}),
    "llama, tied, Llama 3's rope": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral, wide heads": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "phi3": ("phi3", {"sliding_window": None, "original_max_position_embeddings": 1024}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32, "num_hidden_layers": 7, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 100000.0},
        }},
    ),
}
# fmt: on


def make_model(folder: Path, kind: str, **settings: Any) -> Any:
    """A random model in bfloat16 on disk, and the same weights in float32 in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (0.3 if "norm" in name or "bias" in name else 0.15) + ("norm" in name)
            )
    model.to(torch.bfloat16).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", MODELS)
def test_architecture_gives_the_same_logits(tokenizer: Any, tmp_path: Path, name: str) -> None:
    kind, settings = MODELS[name]
    model = make_model(tmp_path, kind, **settings)
    chat = Chat(tokenizer=tokenizer, ends=[2], system=None)
    notes = write_model(tmp_path, tmp_path / "model.gguf", chat=chat, dtype="f16", name="tiny", threads=1)
    assert notes == []
    text = torch.randint(3, 480, (BATCH + 40,), generator=torch.Generator().manual_seed(1)).tolist()
    positions = [0, 5, 70, BATCH - 1, BATCH, BATCH + 39]
    opened = LlamaModel(tmp_path / "model.gguf", adapter=None, context=len(text), threads=1)
    got = np.stack([logits.copy() for logits in opened.logits(text, positions)])
    assert (opened.ends_at(2), opened.ends_at(40)) == (True, False)
    opened.close()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([text])).logits[0, positions].numpy()
    assert np.sqrt(np.square(got - wanted).mean()) < 0.01 * wanted.std()


def test_sliding_window_that_llama_cpp_lacks_cuts_the_context_and_is_reported(tokenizer: Any, tmp_path: Path) -> None:
    make_model(tmp_path, "mistral", sliding_window=128)
    chat = Chat(tokenizer=tokenizer, ends=[2], system=None)
    (note,) = write_model(tmp_path, tmp_path / "model.gguf", chat=chat, dtype="bf16", name="tiny", threads=1)
    assert "cut from 1,024 to 128 tokens" in note


def test_other_rotary_embedding_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
    make_model(tmp_path, "qwen2", rope_parameters=rope)
    chat = Chat(tokenizer=tokenizer, ends=[2], system=None)
    with pytest.raises(ExportError, match=r"types default, linear and llama3; .* has yarn"):
        write_model(tmp_path, tmp_path / "model.gguf", chat=chat, dtype="bf16", name="tiny", threads=1)


def test_weights_beyond_float16_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    chat = Chat(tokenizer=tokenizer, ends=[2], system=None)
    with pytest.raises(
        ExportError,
        match=r"layers.1.mlp.up_proj.weight has weights that overflow float16, up to 9.984e\+04: export bf16",
    ):
        write_model(tmp_path, tmp_path / "model.gguf", chat=chat, dtype="f16", name="tiny", threads=1)


HARD = [
    "I've 3 cats, 33 dogs, 333 birds and 3333 bees; she'LL say DON'T!!",
    "  two  spaces,\ttabs\n\n\nand\r\nlines  \n ",
    "x = foo(bar)[1] // 2\n/*",
    "Ünïcode – 你好，世界 🙂🚀 ação Привет",
    "<|im_start|>user\nHi<|im_end|>\n",
    "ABCdef GHIjkl 12ab34",
    "a",
    " ",
]
"""What pre-tokenizers split differently; in Unicode form NFC."""


def tokens_of(file: Path, text: str) -> list[int]:
    """llama.cpp's own ids, special tokens read as such."""
    model, lib = LlamaModel(file, adapter=None, context=8, threads=1), load_library()
    lib.llama_tokenize.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_int32,
        ctypes.POINTER(ctypes.c_int32),
        ctypes.c_int32,
        ctypes.c_bool,
        ctypes.c_bool,
    ]
    found, raw = (ctypes.c_int32 * 500)(), text.encode()
    count = lib.llama_tokenize(model.vocabulary, raw, len(raw), found, 500, True, True)
    model.close()
    return list(found[:count])


def train(steps: Any, *, ignore_merges: bool = False) -> Any:
    """A byte-level BPE that splits text by the given pre-tokenizer, trained on the hard texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    raw.pre_tokenizer, raw.decoder = steps, decoders.ByteLevel()
    raw.train_from_iterator(
        HARD * 3,
        trainers.BpeTrainer(
            vocab_size=460,
            special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|pad|>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


def written(tmp_path: Path, tokenizer: Any) -> Path:
    if not (tmp_path / "config.json").is_file():
        make_model(tmp_path, "llama", num_hidden_layers=1)
    chat = Chat(tokenizer=tokenizer, ends=[tokenizer.eos_token_id], system=None)
    write_model(tmp_path, tmp_path / "model.gguf", chat=chat, dtype="bf16", name="tiny", threads=1)
    return tmp_path / "model.gguf"


@pytest.mark.parametrize(("splitter", "name"), list(vocabulary.PRETOKENIZERS.items()), ids=str)
def test_text_is_split_as_the_tokenizer_splits_it(
    tmp_path: Path, splitter: tuple[tuple[str, ...], bool], name: str
) -> None:
    from tokenizers import Regex, pre_tokenizers

    patterns, ignore_merges = splitter
    if name in ("gpt-2", "smollm"):
        digits = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
        steps = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    else:
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        steps = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer = train(steps, ignore_merges=ignore_merges)
    file = written(tmp_path, tokenizer)
    for text in HARD:
        assert tokens_of(file, text) == tokenizer(text).input_ids, text


def test_unknown_pretokenizer_is_named(tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    steps = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    with pytest.raises(
        ExportError, match=re.escape("splits text by [aeiou] then a space in front (ignore_merges=False)")
    ):
        written(tmp_path, train(steps))


@pytest.mark.parametrize("prefixed", [True, False], ids=["space in front", "no space in front"])
def test_sentencepiece_tokens_and_bytes_survive(tmp_path: Path, prefixed: bool) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    space = [normalizers.Prepend("▁")] if prefixed else []
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(
        ["the cat and the other cats sat on that mat"] * 3,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False),
    )
    raw = Tokenizer.from_str(re.sub(r'"added_tokens":\s*\[.*?\]', '"added_tokens": []', trained.to_str(), flags=re.S))
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    file = written(tmp_path, tokenizer)
    for text in ("the cat sat", " that other mat", "the  catsé 你</s>", "a"):
        assert tokens_of(file, text) == tokenizer(text).input_ids, text


def test_chats_are_the_same_where_only_the_first_text_has_a_space_in_front(tmp_path: Path) -> None:
    """Transformers 5 reads Llama 2's tokenizer so; llama.cpp would put a space behind every control token."""
    from tests.fixtures.templates import LLAMA2

    tokenizer = make_tokenizer(LLAMA, model_max_length=512)
    tokenizer.chat_template = LLAMA2
    make_model(tmp_path, "llama", num_hidden_layers=1, vocab_size=SMALLEST_VOCABULARY)
    turns = [("user", "Say it"), ("assistant", "It."), ("user", "again")]
    chat = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], tokenize=False, add_generation_prompt=True
    )
    wanted = tokenizer(chat, add_special_tokens=False).input_ids
    chats = Chat(tokenizer=tokenizer, ends=[tokenizer.eos_token_id], system=None)
    notes = write_model(tmp_path, tmp_path / "model.gguf", chat=chats, dtype="bf16", name="tiny", threads=1)
    assert tokens_of(tmp_path / "model.gguf", chat.removeprefix("<s>")) == wanted  # llama.cpp adds it
    assert notes == ["text outside chats begins without the space that the tokenizer puts in front"]


def test_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    make_model(tmp_path, "llama", vocab_size=100)
    with pytest.raises(ExportError, match="the embedding 100 rows"):
        written(tmp_path, tokenizer)


def test_end_tokens_beyond_the_fields_are_noticed_by_the_runtime(tmp_path: Path, tokenizer: Any) -> None:
    from finetune.export.gguf_runtime import _check_ends

    make_model(tmp_path, "llama")
    chat = Chat(tokenizer=tokenizer, ends=[2, 50, 60, 70], system=None)
    write_model(tmp_path, tmp_path / "model.gguf", chat=chat, dtype="bf16", name="tiny", threads=1)
    opened = LlamaModel(tmp_path / "model.gguf", adapter=None, context=8, threads=1)
    _check_ends(opened, [2, 50, 60])
    with pytest.raises(ExportError, match=r"not stop at the tokens \[70\]"):
        _check_ends(opened, chat.ends)
    opened.close()


def test_file_that_llama_cpp_cannot_read_is_refused_with_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ExportError, match=r"llama.cpp cannot load .*model.gguf: .*gguf"):
        LlamaModel(tmp_path / "model.gguf", adapter=None, context=8, threads=1)


@pytest.mark.parametrize("begins", [True, False], ids=["begin added", "begin written"])
@pytest.mark.parametrize("family", ["llama3", "mistral", "phi3", "thinking"])
def test_chats_begin_as_training_saw_them(tmp_path: Path, tokenizer: Any, family: str, begins: bool) -> None:
    from xllamacpp import CommonParams, Server

    from finetune.export.gguf_runtime import _chat_tokens
    from tests.fixtures.templates import FAMILIES, chat_with

    chat = chat_with(tokenizer, FAMILIES[family], begins=begins)
    params = CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.cpuparams.n_threads = (
        str(written(tmp_path, chat.tokenizer)),
        512,
        False,
        1,
    )
    server = Server(params)
    messages = [
        {"role": "user", "content": "  Say it\n"},
        {"role": "assistant", "content": "It."},
        {"role": "user", "content": "again"},
    ]
    wanted = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert _chat_tokens(server, messages) == wanted
