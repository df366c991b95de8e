"""Accountability: who set a value, which value nobody read, whether a run comes out the same again, how two runs differ."""

from finetune.provenance.config_trace import explain
from finetune.provenance.difference import compare
from finetune.provenance.replay import replay
from finetune.provenance.unread import UnreadSetting, idle, tell_idle, tell_unread, watch

__all__ = ["UnreadSetting", "compare", "explain", "idle", "replay", "tell_idle", "tell_unread", "watch"]
