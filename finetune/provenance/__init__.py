"""Who set a setting, which setting has no effect, whether a run repeats, and how two runs differ.

from finetune.provenance import compare, explain

explain("lora.rank", ["+experiment=quickstart"])
compare(Path("outputs/first"), Path("outputs/second"))
"""

from finetune.provenance.config_trace import explain
from finetune.provenance.difference import compare
from finetune.provenance.replay import replay
from finetune.provenance.unused import unused_overrides, warn_unused_overrides

__all__ = ["compare", "explain", "replay", "unused_overrides", "warn_unused_overrides"]
