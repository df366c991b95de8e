"""Measures base, quantized base, adapter and merged model on the same held-out rows, with intervals.

Example::

    scores = evaluate(config.eval, folder=folder, spec=spec, adapter=adapter, merged=merged, data=data, seed=1)
    scores.artifacts["merged"].loss
    scores.changes["tuning"]["loss"].difference
"""

from finetune.eval.config import EvalConfig
from finetune.eval.scorer import AnswerScorer
from finetune.eval.stage import evaluate

__all__ = ["AnswerScorer", "EvalConfig", "evaluate"]
