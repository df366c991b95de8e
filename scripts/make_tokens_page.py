"""Writes docs/tokens.md, the tokens of each family as the line exports them: ``python scripts/make_tokens_page.py``.

A test compares the page with what this writes. No weights are made and nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from benchmarks.walk_tokenizer import KINDS, TokenizerKind, kind_of, make_tokenizer
from finetune.architecture import ArchitectureConfig
from finetune.config import load
from finetune.data import DataConfig
from finetune.data.rendering import make_renderer, rendering_settings
from finetune.hardware import place, probe
from finetune.inference.chat import load_chat
from finetune.merge.candidates import write_chat
from finetune.model import Base, ModelSpec
from finetune.paths import CONF

PAGE = Path(__file__).parents[1] / "docs" / "tokens.md"
INTRO = """# Tokens as exported

Added tokens, ends of turn and `generation_config.json` of each family in the folder that a run exports, written by
`scripts/make_tokens_page.py`. For each kind of tokenizer and template that the options of the `model` group have, the
script makes the tokenizer of the full-size walks (`benchmarks/walk_tokenizer.py`: the class, rules, control tokens and
template of the family with few merges), renders with it as the data stage does, writes the exported files with the
code of the merge stage, and reads them back. So the **ids are those of the small vocabularies**; names, order, roles
and ends are the family's. A run with a model of the hub has its ids; `eos_token_id` then also has what the base's own
`generation_config.json` lists, which these small bases lack.

**Ends** are the tokens at which an answer ends in every export: the tokenizer's end token and the template's end of
turn.

"""
HEAD = (
    "family | option | tokenizer | template | added tokens | begin | end | pad | ends | `eos_token_id`, `pad_token_id`"
)
WITHOUT = "A walk has no tokenizer, or its tokenizer no template, for: "


def page() -> str:
    """Returns the whole page."""
    found, without = kinds()
    lines = [HEAD, " | ".join("---" for _ in HEAD.split(" | "))]
    config = load(["+experiment=llama7b_qlora", "data.template=null"])
    placement = place(probe(config.hardware), config)
    with TemporaryDirectory(prefix="finetune-") as folder, contextlib.redirect_stdout(io.StringIO()):
        for kind in found:
            base = Base(folder=Path(folder) / kind.option, name=kind.name, revision=None, sha256="", source="folder")
            model = dataclasses.replace(config.model, name=kind.name, template=kind.template)
            spec = ModelSpec(base=base, config=model, quantization=config.quantization, placement=placement)
            lines.append(" | ".join(_row(kind, spec, config.data)))
    return INTRO + "".join(f"| {line} |\n" for line in lines) + f"\n{WITHOUT}{', '.join(without)}.\n"


class Kind(NamedTuple):
    """A tokenizer with a template: the family and the first option that have it, and the name of that model.

    Attributes:
        family: Of the model.
        option: Of the model group.
        name: Of the model.
        template: That of the option, for a tokenizer without one of its own.
        tokenizer: What the tokenizer is made of.
    """

    family: str
    option: str
    name: str
    template: str | None
    tokenizer: TokenizerKind


def kinds() -> tuple[list[Kind], list[str]]:
    """Returns each kind that can be made here, and the families that have none."""
    found: dict[tuple[str, ...], Kind] = {}
    families: set[str] = set()
    for file in sorted((CONF / "model").glob("[!_]*.yaml")):
        option: Any = OmegaConf.load(file)
        family = option.architecture.family if option.get("architecture") else None
        if family is None:
            continue
        families.add(family)
        if family not in {"llama", *KINDS}:
            continue
        tokenizer, template = kind_of(option.name, ArchitectureConfig(**option.architecture)), option.get("template")
        if tokenizer.template or template:
            key = (family, repr(tokenizer), tokenizer.template or template)
            found.setdefault(key, Kind(family, file.stem, option.name, template, tokenizer))
    rows = sorted(found.values(), key=lambda kind: kind[:2])
    return rows, sorted(families - {kind.family for kind in rows})


def _row(kind: Kind, spec: ModelSpec, config: DataConfig) -> list[str]:
    """Returns what a run with this tokenizer exports."""
    data, exported = spec.base.folder / "data", spec.base.folder / "exported"
    make_tokenizer(kind.tokenizer, model_max_length=1024).save_pretrained(spec.base.folder)
    data.mkdir()
    exported.mkdir()
    tokenizer = spec.load_tokenizer()
    renderer = make_renderer(config, tokenizer, raw=False, has_thoughts=bool)
    settings = rendering_settings(renderer, tokenizer, config)
    (data / "rendering.json").write_text(json.dumps(settings), encoding="utf-8")
    chat = load_chat(spec, data)
    write_chat(exported, chat)
    added = json.loads((exported / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    names = json.loads((exported / "tokenizer_config.json").read_text(encoding="utf-8"))
    generation = json.loads((exported / "generation_config.json").read_text(encoding="utf-8"))
    roles = [names.get(f"{role}_token") for role in ("bos", "eos", "pad")]
    return [
        kind.family,
        kind.option,
        names["tokenizer_class"],
        kind.tokenizer.template or str(kind.template),
        ", ".join(f"{_code(token['content'])} {token['id']}" for token in added),
        *(_code(role) if role else "none" for role in roles),
        ", ".join(_code(chat.tokenizer.convert_ids_to_tokens(end)) for end in chat.ends),
        f"{generation['eos_token_id']}, {generation['pad_token_id']}",
    ]


def _code(token: str) -> str:
    return f"<code>{html.escape(token).replace('|', '&#124;')}</code>"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
