"""Decides how conversations are written: template, system message, date, and whether the model thinks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetune.console import log
from finetune.data.config import DataConfig
from finetune.data.conversation import BadRow
from finetune.data.generation_marks import check_generation_marks
from finetune.data.render import Renderer
from finetune.data.template import PROBE_ANSWER, PROBE_QUESTION, Template, inspect_template, set_template
from finetune.data.thoughts import KEEP, REFUSE, REMOVE
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_renderer(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, raw: bool, has_thoughts: Callable[[], bool]
) -> Renderer:
    """Returns the renderer of a run, logs its decisions, and gives the tokenizer the template to serve with.

    Args:
        raw: Whether all rows are raw text, which needs no template.
        has_thoughts: Looks for thoughts in the first rows; called where ``data.thinking=auto`` depends on them.

    Raises:
        ConfigError: The template refuses ``data.system``.
        DataError: The template cannot be used for training.
    """
    if not raw or config.template:
        set_template(config.template, tokenizer)
    eos, bos = tokenizer.eos_token, tokenizer.bos_token
    adds_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    renderer = Renderer(
        template=None,
        train_roles=frozenset(config.train_roles),
        system=config.system,
        control_tokens=config.control_tokens,
        tools=config.tools,
        bos=str(bos) if bos and adds_bos else "",
        eos=str(eos) if eos else "",
    )
    if raw:
        return renderer
    template = inspect_template(tokenizer, date=config.template_date, limits=config.limits)
    template, thinking, why = choose_thinking(config.thinking, template, has_thoughts)
    tokenizer.chat_template = template.source
    log("data", *[why] if why else [])
    if template.writes_date:
        log(
            "data",
            f"the chat template writes the date of the day: rows have {config.template_date} (data.template_date), so "
            "that they are the same every day; serving writes the day's own",
        )
    if not template.end_of_turn:
        log("data", f"the chat template does not end an answer; {template.end} ends each trained answer")
    if config.system is not None:
        _check_system(config.system, template)
    renderer = replace(renderer, template=template, thinking=thinking)
    check_generation_marks(template, renderer)
    return renderer


def choose_thinking(setting: str, template: Template, has_thoughts: Callable[[], bool]) -> tuple[Template, str, str]:
    """Applies ``data.thinking``.

    Returns:
        The template with its switch set, what is done with thoughts in rows, and a sentence about it; "" where there
        was nothing to decide.
    """
    if setting == "drop" or (setting == "auto" and template.switch is None):
        return template, REMOVE if setting == "drop" else KEEP, ""
    why = f"data.thinking={setting}"
    if setting == "auto":
        found = has_thoughts()
        why += ": the first rows have thoughts" if found else ": the first rows have no thoughts"
        thinking = KEEP if found else REFUSE
    else:
        thinking = KEEP if setting == "train" else REMOVE
    if template.switch is None:
        without = f"{why}: thoughts are removed from the rows; the template has no variable to turn them off"
        return template, thinking, without if setting == "off" else ""
    enabled = thinking == KEEP
    where = "in training, evaluation and the exported chat template"
    return template.with_thinking(enabled), thinking, f"{why}; {template.switch}={str(enabled).lower()} {where}"


def _check_system(system: str, template: Template) -> None:
    """Checks that the template writes a system message.

    Raises:
        ConfigError: It refuses or drops it.
    """
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": PROBE_QUESTION},
        {"role": "assistant", "content": PROBE_ANSWER},
    ]
    try:
        written = system.strip() in template.render(messages)
        reason = "does not write it"
    except BadRow as error:
        written, reason = False, f"refuses it ({error.detail})"
    if not written:
        raise ConfigError(
            f"data.system is set, and the model's chat template {reason}; remove data.system, put the instruction into "
            "the questions, or choose another template with data.template=..."
        )


def rendering_settings(renderer: Renderer, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> dict[str, Any]:
    """Returns what serving must share, for ``rendering.json``."""
    template = renderer.template
    end = template.end if template else renderer.eos
    return {
        "template": template.source if template else None,
        "end_of_turn": end,
        "end_of_turn_id": tokenizer.convert_tokens_to_ids(end) if end else None,
        "bos": renderer.bos,
        "train_roles": config.train_roles,
        "system": config.system,
        "control_tokens": config.control_tokens,
        "thinking": config.thinking,
        "template_date": config.template_date if template and template.writes_date else None,
    }
