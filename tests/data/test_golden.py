"""Golden renderings of the shipped templates: text, token ids and masks.

The texts were written by hand after each model family's published format; trained spans are between the marks. The
tokenizers have one token per byte and one per control token, so the ids follow from the text without running ours.
"""

import re
from typing import Any

import pytest

from finetune.data import template
from finetune.data.conversation import Conversation
from finetune.data.encoder import Encoded, Encoder
from finetune.data.generation_marks import check_generation_marks
from finetune.data.render import Renderer
from finetune.errors import DataError

CONTROL = {
    "llama2": ["<s>", "</s>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gemma": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "smollm2": ["<|im_start|>", "<|im_end|>"],
}
EOS = {"qwen": "<|im_end|>"}
TURNS = [("user", "Hi"), ("assistant", "Yo é"), ("user", "Bye"), ("assistant", "Ciao.\nSoon")]
GOLDEN = {
    "llama2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]⟪ Yo é </s>⟫<s>[INST] Bye [/INST]⟪ Ciao.\nSoon </s>⟫",
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟪Yo é<|eot_id|>⟫"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟪Ciao.\nSoon<|eot_id|>⟫"
    ),
    "mistral": "<s>[INST] Be kind.\n\nHi [/INST]⟪ Yo é</s>⟫[INST] Bye [/INST]⟪ Ciao.\nSoon</s>⟫",
    "qwen": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟪Yo é<|im_end|>⟫\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n⟪Ciao.\nSoon<|im_end|>⟫\n"
    ),
    "gemma": (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n⟪Yo é<end_of_turn>⟫\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟪Ciao.\nSoon<end_of_turn>⟫\n"
    ),
    "phi3": (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n⟪Yo é<|end|>⟫\n"
        "<|user|>\nBye<|end|>\n<|assistant|>\n⟪Ciao.\nSoon<|end|>⟫\n<|endoftext|>"
    ),
}
GOLDEN["chatml"] = GOLDEN["smollm2"] = GOLDEN["qwen"]
NAMES = sorted(GOLDEN)
SETTINGS: dict[str, Any] = {
    "train_roles": frozenset(["assistant"]),
    "system": None,
    "control_tokens": "text",
    "tools": "template",
    "bos": "",
    "eos": "",
}


def bytes_tokenizer(name: str) -> Any:
    """Builds a tokenizer of control tokens and the 256 bytes in the order of GPT-2's byte alphabet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control = CONTROL[name]
    vocabulary = {token: number for number, token in enumerate([*control, *byte_alphabet()])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=control[0],
        eos_token=EOS.get(name, control[1]),
        additional_special_tokens=control,
    )
    template.set_template(name, tokenizer)
    return tokenizer


def byte_alphabet() -> list[str]:
    """Returns GPT-2's printable characters for bytes, byte 0 first (Radford et al., 2019, encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def expected(name: str) -> tuple[list[int], list[int]]:
    """Returns token ids and mask, directly from the golden text."""
    control = CONTROL[name]
    ids, mask, inside = [], [], 0
    for piece in re.split(f"({'|'.join(map(re.escape, [*control, '⟪', '⟫']))})", GOLDEN[name]):
        if piece in ("⟪", "⟫"):
            inside = int(piece == "⟪")
            continue
        new = [control.index(piece)] if piece in control else [len(control) + byte for byte in piece.encode()]
        ids += new
        mask += [inside] * len(new)
    return ids, mask


def render(name: str, turns: list[tuple[str, str]], **changes: Any) -> tuple[Any, Encoded]:
    tokenizer = bytes_tokenizer(name)
    renderer = Renderer(template=template.inspect_template(tokenizer), **{**SETTINGS, **changes})
    conversation = Conversation([{"role": role, "content": content} for role, content in turns])
    encoded = Encoder.of(tokenizer).encode(renderer.render(conversation))[0]
    assert isinstance(encoded, Encoded)
    return tokenizer, encoded


def golden_turns(name: str) -> list[tuple[str, str]]:
    return TURNS if name == "gemma" else [("system", "Be kind."), *TURNS]


@pytest.mark.parametrize("name", NAMES)
def test_template_renders_its_golden_token_ids(name: str) -> None:
    _, encoded = render(name, golden_turns(name))
    assert encoded.ids == expected(name)[0]


@pytest.mark.parametrize("name", NAMES)
def test_template_marks_its_golden_mask(name: str) -> None:
    _, encoded = render(name, golden_turns(name))
    assert encoded.loss_mask().tolist() == expected(name)[1]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_before_the_answer_is_what_serving_sends(name: str) -> None:
    tokenizer, encoded = render(name, golden_turns(name))
    request = [{"role": role, "content": content} for role, content in golden_turns(name)[:-1]]
    served = tokenizer.apply_chat_template(request, add_generation_prompt=True, tokenize=False)
    assert encoded.ids[: encoded.answer] == tokenizer(served, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", NAMES)
def test_the_generation_marks_of_shipped_templates_agree_with_ours(name: str) -> None:
    tokenizer = bytes_tokenizer(name)
    turns = [{"role": role, "content": content} for role, content in TURNS]
    both = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    _, encoded = render(name, TURNS)
    assert both["input_ids"] == encoded.ids
    assert both["assistant_masks"] == encoded.loss_mask().tolist()


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_in_a_users_text_stay_text(name: str) -> None:
    end = template.inspect_template(bytes_tokenizer(name)).end_of_turn
    tokenizer, encoded = render(name, [("user", f"a {end} b"), ("assistant", f"you wrote {end}!")])
    tokenizer2, plain = render(name, [("user", "a b"), ("assistant", "you wrote!")])
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert encoded.ids.count(end_id) == plain.ids.count(tokenizer2.convert_tokens_to_ids(end))
    assert f"you wrote {end}!" in tokenizer.decode(encoded.ids, skip_special_tokens=False)


def test_control_tokens_in_a_users_text_are_read_with_control_tokens_control() -> None:
    tokenizer, encoded = render("chatml", [("user", "a <|im_end|> b"), ("assistant", "c")], control_tokens="control")
    assert encoded.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3


def test_user_turns_are_trained_on_where_their_role_is() -> None:
    tokenizer, encoded = render("chatml", TURNS[:2], train_roles=frozenset(["user", "assistant"]))
    trained = tokenizer.decode([token for token, mark in zip(encoded.ids, encoded.loss_mask(), strict=True) if mark])
    assert trained == "user\nHi<|im_end|>Yo é<|im_end|>"  # the first token of a document has no token before it


def test_generation_marks_that_hold_less_than_the_answer_are_refused() -> None:
    tokenizer = bytes_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
        "{%- generation -%}{{- message['content'][:3] -}}{%- endgeneration -%}"
        "{{- message['content'][3:] + '<|im_end|>' -}}",
    )
    chat = template.inspect_template(tokenizer)
    renderer = Renderer(template=chat, **SETTINGS)
    with pytest.raises(DataError, match="generation marks contain"):
        check_generation_marks(chat, renderer)


UNENDED = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_template_without_an_end_of_turn_is_refused_where_the_tokenizer_has_no_eos() -> None:
    tokenizer = bytes_tokenizer("chatml")
    tokenizer.chat_template, tokenizer.eos_token = UNENDED, None
    with pytest.raises(DataError, match="would never learn to stop"):
        template.inspect_template(tokenizer)


def test_template_of_another_tokenizer_is_refused() -> None:
    tokenizer = bytes_tokenizer("llama3")
    template.set_template("gemma", tokenizer)
    with pytest.raises(DataError, match=r"'<end_of_turn>\\n', which does not begin with a control token"):
        template.inspect_template(tokenizer)


def test_eos_ends_the_answers_of_a_template_without_an_end_of_turn() -> None:
    tokenizer = bytes_tokenizer("chatml")
    tokenizer.chat_template = UNENDED
    renderer = Renderer(template=template.inspect_template(tokenizer), **SETTINGS)
    rows = renderer.render(Conversation([{"role": role, "content": content} for role, content in TURNS]))
    assert [row.text for row in rows] == [
        "user: Hi\nassistant: Yo é\nuser: Bye\nassistant: Ciao.\nSoon\n<|im_end|>",
        "user: Hi\nassistant: Yo é\n<|im_end|>",
    ]
    assert [[row.text[slice(*span)] for span in row.spans] for row in rows] == [
        ["Ciao.\nSoon\n<|im_end|>"],
        ["Yo é\n<|im_end|>"],
    ]


def test_template_that_writes_bos_twice_is_refused() -> None:
    tokenizer = bytes_tokenizer("llama3")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(DataError, match="twice"):
        template.inspect_template(tokenizer)


def test_tokenizer_without_a_template_names_the_choices() -> None:
    tokenizer = bytes_tokenizer("chatml")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="choose one of alpaca, chatml, gemma, guanaco, llama2"):
        template.set_template(None, tokenizer)


def test_template_whose_prompt_is_not_what_precedes_the_answer_is_refused() -> None:
    tokenizer = bytes_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_start|>assistant\\n'", "'<|im_start|>bot\\n'")
    chat = template.inspect_template(tokenizer)
    with pytest.raises(DataError, match="prompt is not a prefix of the conversation"):
        check_generation_marks(chat, Renderer(template=chat, **SETTINGS))


def llama_tokenizer() -> Any:
    """Builds a tokenizer like that of Llama 2: a space in front, spaces as U+2581, bytes as a last resort."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{byte:02X}>" for byte in range(256)],
        "\u2581",
        *"INSTHiYoByeCaSn[]/.,!<>",
        "\u2581Y",
        "\u2581Yo",
    ]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    raw = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[("\u2581", "Y"), ("\u2581Y", "o")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    template.set_template("llama2", tokenizer)
    return tokenizer


def test_sentencepiece_spaces_belong_to_the_answer() -> None:
    tokenizer = llama_tokenizer()
    renderer = Renderer(template=template.inspect_template(tokenizer), **SETTINGS)
    conversation = Conversation(
        [{"role": role, "content": content} for role, content in [("user", "Hi"), ("assistant", "Yo"), *TURNS[2:]]]
    )
    encoded = Encoder.of(tokenizer).encode(renderer.render(conversation))[0]
    assert isinstance(encoded, Encoded)
    assert not encoded.in_pieces
    assert tokenizer.convert_ids_to_tokens(encoded.ids[slice(*encoded.spans[0])]) == ["\u2581Yo", "\u2581", "</s>"]
    assert [encoded.ids[end - 1] for _, end in encoded.spans] == [tokenizer.eos_token_id] * 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prompt", [False, True])
def test_our_rendering_is_apply_chat_templates(name: str, prompt: bool) -> None:
    tokenizer = bytes_tokenizer(name)
    turns = [{"role": role, "content": content} for role, content in golden_turns(name)][: -1 if prompt else None]
    theirs = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    assert template.inspect_template(tokenizer).render(turns, prompt=prompt) == theirs


def test_our_rendering_of_tools_is_apply_chat_templates() -> None:
    tokenizer = bytes_tokenizer("qwen")
    tools = [
        {
            "type": "function",
            "function": {"name": "lookup", "description": "find", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"a": "é"}}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r"},
    ]
    theirs = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=True)
    assert template.inspect_template(tokenizer).render(turns, tools=tools, prompt=True) == theirs
