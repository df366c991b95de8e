"""Accountability: who set a value, which value nobody read, whether a run comes out the same again, how two runs differ."""

from finetune.account.difference import compare
from finetune.account.origin import explain
from finetune.account.replay import replay
from finetune.account.unread import UnreadSetting, idle, tell_idle, tell_unread, watch

__all__ = ["UnreadSetting", "compare", "explain", "idle", "replay", "tell_idle", "tell_unread", "watch"]
