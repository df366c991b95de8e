"""How good is it: base, quantized base, adapter and merged model on the same held-out rows, with intervals."""

from finetune.eval.config import EvalConfig
from finetune.eval.scorer import Judge
from finetune.eval.stage import Scores, score

__all__ = ["EvalConfig", "Judge", "Scores", "score"]
