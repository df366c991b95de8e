"""Checks the rows before anyone pays for training on them.

Example::

    from finetune.data.checks import collect_warnings

    for warning in collect_warnings(config, store, selection, tokenizer=tokenizer, renderer=renderer):
        print(warning)
"""

from finetune.data.checks.warnings import collect_warnings

__all__ = ["collect_warnings"]
