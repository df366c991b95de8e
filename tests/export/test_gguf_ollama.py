"""The Go template that a Modelfile carries writes what the model's own template writes, or there is none."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter

from finetune.chat_templates import read_template
from finetune.data.template import inspect_template
from finetune.export.gguf.ollama import PROBES, UnsupportedTemplateError, infer_template, write_modelfile
from finetune.export.gguf.vocabulary import write_vocabulary
from tests.export.gotemplate import execute
from tests.fixtures.templates import FAMILIES, GEMMA, LLAMA2, PHI3, chat_with


@pytest.mark.parametrize("begins", [True, False], ids=["begin added", "begin written"])
@pytest.mark.parametrize("family", [*FAMILIES, "chatml"])
def test_go_template_writes_the_same_tokens(tokenizer: Any, family: str, begins: bool) -> None:
    chat = chat_with(tokenizer, FAMILIES.get(family, tokenizer.chat_template), begins=begins)
    template = infer_template(chat).source()
    takes_system = family not in ("gemma", "mistral")
    compared = [messages for messages in PROBES if takes_system or messages[0]["role"] != "system"]
    assert len(compared) > 3
    for messages in compared:
        expected = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        adds = begins and family in ("llama3", "gemma", "mistral", "chatml", "thinking")
        assert chat.tokenizer(execute(template, messages), add_special_tokens=adds).input_ids == expected


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LLAMA2, "no Go template of the known shape"),
        ("{{ strftime_now('%d %b %Y') }}" + PHI3, "the date of the day"),
        ("{{ messages[-1]['content'] }}", "leaves out messages"),
        (None, "has no chat template"),
    ],
)
def test_unsupported_template_is_left_out_and_reported(
    tokenizer: Any, tmp_path: Path, template: str | None, why: str
) -> None:
    chat = chat_with(tokenizer, template)
    with pytest.raises(UnsupportedTemplateError, match=why):
        infer_template(chat)
    notes = write_modelfile(tmp_path / "Modelfile", chat, source="FROM ./model.gguf")
    assert "TEMPLATE" not in (tmp_path / "Modelfile").read_text()
    assert "Ollama then takes the nearest" in notes[0]


def test_modelfile_holds_stops_and_the_system_message_of_the_training(tokenizer: Any, tmp_path: Path) -> None:
    chat = chat_with(tokenizer, tokenizer.chat_template, system='Say "yes".')
    assert write_modelfile(tmp_path / "Modelfile", chat, source="FROM ./model.gguf") == []
    text = (tmp_path / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{-')
    assert text.endswith('"""\nSYSTEM """Say "yes"."""\nPARAMETER stop "<|im_end|>"\n')


def test_go_template_refuses_a_system_message_where_the_template_does(tokenizer: Any) -> None:
    template = infer_template(chat_with(tokenizer, GEMMA)).source()
    with pytest.raises(TypeError):  # Go: cannot index slice/array with type string
        execute(template, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}])
    assert json.dumps("the template of this model takes no system message") in template


def test_go_template_sends_the_empty_thought_that_a_model_without_thoughts_was_trained_after(tokenizer: Any) -> None:
    template = inspect_template(chat_with(tokenizer, read_template("trl:qwen3")).tokenizer).with_thinking(False)
    assert isinstance(template.source, str)
    inferred = infer_template(chat_with(tokenizer, template.source))
    text = execute(inferred.source(), [{"role": "user", "content": "one"}])
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_named_templates_are_written_by_name(tokenizer: Any, tmp_path: Path) -> None:
    named = {"default": read_template("chatml"), "tool_use": read_template("qwen")}
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    write_vocabulary(writer, chat_with(tokenizer, named), rows=512)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == named["default"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == named["tool_use"]
