"""Secrets come from the environment and go nowhere: no setting takes one, and no file of a run holds one."""

import re

from finetune.config import RunConfig
from finetune.config.fields import all_keys

SECRET = re.compile(r"token|secret|key|password|passwd|credential|auth")
NO_SECRETS = {
    "data.checks.secret_share": "the share of rows that look as if they held secrets",
    "data.control_tokens": "what <|im_end|> inside a text means",
    "lora.tokens": "words of the vocabulary",
    "model.architecture.full_value_is_key": "of an attention head: whether its values are its keys",
    "model.architecture.linear_key_heads": "of linear attention: their number",
}
COUNTS = re.compile(r"(_tokens|tokens_per_step|kv_heads)$")
"""Tokens of text, counted."""


def test_the_schema_has_no_field_for_a_secret() -> None:
    suspicious = {
        key for key in all_keys(RunConfig) if SECRET.search(key.rsplit(".", 1)[-1]) and not COUNTS.search(key)
    }
    assert suspicious <= NO_SECRETS.keys()
