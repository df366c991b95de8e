"""The Go template that a Modelfile carries writes what the model's own template writes, or there is none."""

import json
from pathlib import Path
from typing import Any

import pytest
from gotemplate import execute

from finetune.export.gguf.ollama import PROBES, NoShapeError, shape_of, write
from finetune.inference.chat import Chat

LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}"
    "{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] if loop.first and system else message['content'] %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ALPACA = (
    "{% if messages[0]['role'] != 'system' %}{{ 'Below is an \"instruction\" in {{ braces }}.\n\n' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}"
    "{% else %}{{ message['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
FAMILIES = {"llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "phi3": PHI3, "alpaca": ALPACA, "thinking": THINKING}


def chat_with(tokenizer: Any, template: str | None, *, system: str | None = None, begins: bool = False) -> Chat:
    """The session's tokenizer with another template; ``begins`` makes it put its begin token in front of plain text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    own = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token="<|pad|>", bos_token="<|im_start|>", eos_token="<|im_end|>",
    )  # fmt: skip
    if begins:
        own.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    own.chat_template = template
    return Chat(tokenizer=own, ends=[2], system=system)


@pytest.mark.parametrize("begins", [True, False], ids=["begin added", "begin written"])
@pytest.mark.parametrize("family", [*FAMILIES, "chatml"])
def test_go_template_writes_the_same_tokens(tokenizer: Any, family: str, begins: bool) -> None:
    chat = chat_with(tokenizer, FAMILIES.get(family, tokenizer.chat_template), begins=begins)
    template = shape_of(chat).go()
    takes_system = family not in ("gemma", "mistral")
    compared = [messages for messages in PROBES if takes_system or messages[0]["role"] != "system"]
    assert len(compared) > 3
    for messages in compared:
        own = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        adds = begins and family in ("llama3", "gemma", "mistral", "chatml", "thinking")
        assert chat.tokenizer(execute(template, messages), add_special_tokens=adds).input_ids == own


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LLAMA2, "no Go template of the known shape"),
        ("{{ strftime_now('%d %b %Y') }}" + PHI3, "the date of the day"),
        ("{{ messages[-1]['content'] }}", "leaves out messages"),
        (None, "has no chat template"),
    ],
)
def test_template_of_another_shape_is_left_out_and_said(
    tokenizer: Any, tmp_path: Path, template: str | None, why: str
) -> None:
    chat = chat_with(tokenizer, template)
    with pytest.raises(NoShapeError, match=why):
        shape_of(chat)
    notes = write(tmp_path / "Modelfile", chat, source="FROM ./model.gguf")
    assert "TEMPLATE" not in (tmp_path / "Modelfile").read_text()
    assert "Ollama then takes the nearest" in notes[0]


def test_modelfile_holds_stops_and_the_system_message_of_the_training(tokenizer: Any, tmp_path: Path) -> None:
    chat = chat_with(tokenizer, tokenizer.chat_template, system='Say "yes".')
    assert write(tmp_path / "Modelfile", chat, source="FROM ./model.gguf") == []
    text = (tmp_path / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{-')
    assert text.endswith('"""\nSYSTEM """Say "yes"."""\nPARAMETER stop "<|im_end|>"\n')


def test_go_template_refuses_a_system_message_where_the_template_does(tokenizer: Any) -> None:
    template = shape_of(chat_with(tokenizer, GEMMA)).go()
    with pytest.raises(TypeError):  # Go: cannot index slice/array with type string
        execute(template, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}])
    assert json.dumps("the template of this model takes no system message") in template
