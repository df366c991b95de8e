"""Shows prepared data before training: the printed summary, the preview page, and the fate of one row.

Example::

    from finetune.data.show import explain_row

    print(explain_row(Path("outputs/mine/data"), "train.jsonl:137", tokenizer))
"""

from finetune.data.show.explain import explain_row
from finetune.data.show.preview import write_preview
from finetune.data.show.summary import log_summary

__all__ = ["explain_row", "log_summary", "write_preview"]
