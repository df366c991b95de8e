"""Run as ``python -m finetune.merge.reload``: opens a merged folder with plain transformers and measures it again."""

from pathlib import Path
from typing import Any

from finetune.inference.fresh_process import serve_request
from finetune.inference.kl_divergence import KLResult, ReferenceLogits, compare_with_reference
from finetune.inference.rows import read_rows
from finetune.trust import check_remote_code


def remeasure(request: dict[str, Any]) -> KLResult:
    """Agreement of the model in a folder with the reference that an earlier process recorded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(request["threads"])
    check_remote_code(Path(request["folder"]), request["remote_code"])
    AutoTokenizer.from_pretrained(request["folder"])
    model = AutoModelForCausalLM.from_pretrained(
        request["folder"],
        dtype=getattr(torch, request["dtype"]),
        attn_implementation=request["attention"],
        device_map={"": request["device"]},
        trust_remote_code=bool(request["remote_code"]),
    )
    rows = read_rows(Path(request["heldout"]), limit=request["rows"])
    reference = ReferenceLogits(**{**request["reference"], "file": Path(request["reference"]["file"])})
    return compare_with_reference(model, rows, reference, batch_tokens=request["batch_tokens"])


if __name__ == "__main__":
    serve_request(remeasure)
