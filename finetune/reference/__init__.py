"""Every setting with its type, default, rules and values, read from the dataclasses and from ``conf/``.

from finetune.reference import find

for entry in find("lora.rank"):     # one setting, or those below a prefix; ConfigError names the closest
    print(entry.key, entry.type, entry.default, entry.rules, entry.about)
"""

from finetune.reference.entries import Entry, entries, find
from finetune.reference.markdown import page
from finetune.reference.schema import experiment_schema

__all__ = ["Entry", "entries", "experiment_schema", "find", "page"]
