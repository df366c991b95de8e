"""Names of stages, artifacts and metrics for readers."""

ARTIFACTS = {
    "base": "Base model",
    "base_quantized": "Base, quantized",
    "adapter": "Quantized + adapter",
    "merged": "Merged model",
}
CHANGES = {
    "quantization": "Cost of quantization",
    "tuning": "Gain of tuning",
    "merge": "Cost of the merge",
    "total": "Base to merged",
}
STAGES = {
    "plan": "plan",
    "data": "prepare data",
    "model": "load model",
    "preflight": "preflight",
    "train": "train",
    "merge": "merge",
    "eval": "evaluate",
    "export": "export",
    "report": "report",
}
METRICS = {
    "exact_match": "Whole answer right",
    "json_exact": "Whole answer right",
    "json_fields": "Fields right",
    "json_valid": "Valid JSON",
    "label": "Right label",
    "number": "Right number",
    "number_given": "Gives a number",
    "label_known": "Known label",
    "code_valid": "Valid Python",
    "pass_at_1": "Tests passed",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "token_f1": "Words right (F1)",
}


def stage_title(stage: str) -> str:
    """Returns ``evaluate`` for ``eval``."""
    return STAGES.get(stage, stage)


def metric_title(name: str) -> str:
    """Returns ``Valid JSON`` for ``json_valid``, and a readable form of any other name."""
    return METRICS.get(name, name.replace("_", " ").capitalize())
