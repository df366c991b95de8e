"""Measures base, quantized base, adapter and merged model on the same held-out rows, with intervals.

scores = evaluate(config.eval, folder=folder, spec=spec, adapter=adapter, merged=merged, data=data, seed=1)
print(scores.artifacts["adapter"]["loss"])
"""

from finetune.eval.config import EvalConfig
from finetune.eval.scorer import Judge
from finetune.eval.stage import evaluate

__all__ = ["EvalConfig", "Judge", "evaluate"]
