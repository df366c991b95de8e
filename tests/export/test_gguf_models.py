"""Each architecture and each kind of tokenizer gives in llama.cpp what it gives in transformers."""

import ctypes
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

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
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
SCALED = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
DELTA_NETS = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
GEMMA4 = {
    "head_dim": 32,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 32,
    "num_hidden_layers": 7,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
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
    "gemma4": ("gemma4_text", {**GEMMA4, "hidden_size_per_layer_input": 0}),
    "gemma4, unified": ("gemma4_unified_text", GEMMA4),
    "qwen2, YaRN": ("qwen2", {"rope_parameters": YARN}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 32, "num_hidden_layers": 5, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": YARN,
    }}),
    "granite": ("granite", SCALED),
    "granite 4, attention alone": ("granitemoehybrid", {
        **SCALED, "layer_types": ["full_attention"] * 3, "shared_intermediate_size": 96, "num_local_experts": 0,
        "position_embedding_type": "rope", "num_experts_per_tok": 0,
    }),
    "phi": ("phi", {"num_key_value_heads": 4, "rope_parameters": PARTIAL}),
    "glm4": ("glm4", {"head_dim": 16, "rope_parameters": PARTIAL}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "intermediate_size": 192,
                      "block_multiple_of": 64}),
    "ministral3": ("ministral3", {"head_dim": 32, "rope_parameters": {
        **YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True, "head_dim": 32, "num_experts": 4}),
    "qwen3_5": ("qwen3_5_text", {**DELTA_NETS, "num_hidden_layers": 4}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {
        **DELTA_NETS, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64, "num_hidden_layers": 4,
    }),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "glm4_moe": ("glm4_moe", {
        **EXPERTS, "head_dim": 32, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "use_qk_norm": True, "attention_bias": True, "rope_parameters": PARTIAL,
    }),
    "gpt_oss": ("gpt_oss", {
        "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32,
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": YARN,
    }),
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
            if kind.startswith("gemma4") and "k_norm" in name:  # its scores are not divided: at this size they would be
                parameter *= 0.3  # so far apart that the rounding of one changes the token that is attended to
    model.to(torch.bfloat16).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", MODELS)
def test_architecture_gives_the_same_logits(tokenizer: Any, tmp_path: Path, name: str) -> None:
    kind, settings = MODELS[name]
    model = make_model(tmp_path, kind, **settings)
    assert write(tmp_path, tokenizer) == []
    assert_same_logits(model, tmp_path / "model.gguf")


def write(folder: Path, tokenizer: Any, dtype: str = "f16") -> list[str]:
    chat = Chat(tokenizer=tokenizer, ends=[2], system=None)
    return write_model(folder, folder / "model.gguf", chat=chat, dtype=dtype, name="tiny", threads=1)


def assert_same_logits(model: Any, file: Path) -> None:
    text = torch.randint(3, 480, (BATCH + 40,), generator=torch.Generator().manual_seed(1)).tolist()
    positions = [0, 5, 70, BATCH - 1, BATCH, BATCH + 39]
    opened = LlamaModel(file, adapter=None, context=len(text), threads=1)
    got = np.stack([logits.copy() for logits in opened.logits(text, positions)])
    assert (opened.ends_at(2), opened.ends_at(40)) == (True, False)
    opened.close()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([text])).logits[0, positions].numpy()
    assert np.sqrt(np.square(got - wanted).mean()) < 0.01 * wanted.std()


@pytest.mark.parametrize("layer", ["in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj"])
def test_a_lora_of_a_delta_net_changes_places_as_its_weight_does(layer: str, tmp_path: Path) -> None:
    from finetune.export.gguf.architecture import Layout
    from finetune.export.gguf_lora import _tensors

    kind, settings = MODELS["qwen3_5"]
    model = make_model(tmp_path, kind, **settings)
    layout, module = Layout(tmp_path), f"model.layers.0.linear_attn.{layer}"
    weight = model.get_submodule(module).weight
    a, b = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    saved = {f"base_model.model.{module}.lora_{name}.weight": value for name, value in (("A", a), ("B", b))}
    moved = dict(_tensors(saved, config={"lora_alpha": 2.0}, layout=layout))
    new_a, new_b = (next(value for name, value in moved.items() if name.endswith(end)) for end in ("_a", "_b"))
    assert torch.allclose(new_b @ new_a, layout.converted(f"{module}.weight", b @ a), atol=1e-5)


def test_an_image_text_model_is_exported_without_its_towers(tokenizer: Any, tmp_path: Path) -> None:
    kind, settings = MODELS["ministral3"]
    model = make_model(tmp_path, kind, **settings)
    file = tmp_path / "model.safetensors"
    named = {
        name if name == "lm_head.weight" else f"model.language_model.{name.removeprefix('model.')}": tensor
        for name, tensor in load_file(file).items()
    }
    named["model.vision_tower.patch_conv.weight"] = named["lm_head.weight"].clone()
    named["model.multi_modal_projector.norm.weight"] = named["model.language_model.norm.weight"].clone()
    save_file(named, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mistral3", "tie_word_embeddings": False, "text_config": config})
    )
    (note,) = write(tmp_path, tokenizer)
    assert "2 tensors of the checkpoint are left out (1 of multi_modal_projector, 1 of vision_tower)" in note
    assert_same_logits(model, tmp_path / "model.gguf")


def test_layers_that_predict_further_tokens_are_left_out_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    kind, settings = MODELS["glm4_moe"]
    model = make_model(tmp_path, kind, **settings)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {**tensors, "model.layers.3.eh_proj.weight": tensors["lm_head.weight"].clone()}, file, metadata={"format": "pt"}
    )
    (note,) = write(tmp_path, tokenizer)
    assert "1 tensors of the checkpoint are left out (1 of layers that predict further tokens)" in note
    assert_same_logits(model, tmp_path / "model.gguf")


def test_sliding_window_that_llama_cpp_lacks_cuts_the_context_and_is_reported(tokenizer: Any, tmp_path: Path) -> None:
    make_model(tmp_path, "mistral", sliding_window=128)
    (note,) = write(tmp_path, tokenizer, "bf16")
    assert "cut from 1,024 to 128 tokens" in note


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("qwen2", {"rope_parameters": {**YARN, "rope_type": "dynamic"}}, r"type dynamic \(known: default, linear"),
        ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.5}}, "YaRN with attention_factor 1.5"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1]}, "other layers without rotary embedding than every fourth"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=false"),
        ("qwen3_5", {"layer_types": ["full_attention", *["linear_attention"] * 3]}, "full attention at other places"),
        ("granite 4, attention alone", {"position_embedding_type": None}, "no rotary embedding"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    tokenizer: Any, tmp_path: Path, name: str, change: dict[str, Any], reason: str
) -> None:
    kind, settings = MODELS[name]
    make_model(tmp_path, kind, **{**settings, **change})
    with pytest.raises(ExportError, match=rf"{reason}.*, which llama.cpp computes otherwise: ship it as"):
        write(tmp_path, tokenizer)
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 512}, "per-layer embeddings"),
        ({"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 1}, "keys and values that layers share"),
    ],
)
def test_what_the_export_of_gemma_4_does_not_write_is_refused(
    tokenizer: Any, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model("gemma4_text", **{**SIZES, **GEMMA4, **change}).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=f"has {what}, which GGUF export does not write: ship it as safetensors"):
        write(tmp_path, tokenizer)


def test_weights_beyond_float16_are_refused(tokenizer: Any, tmp_path: Path) -> None:
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
