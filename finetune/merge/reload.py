"""Run as ``python -m finetune.merge.reload``: loads a merged folder with plain transformers and measures it again."""

from pathlib import Path
from typing import Any

from finetune.inference.fresh_process import serve_request
from finetune.inference.kl_divergence import KLResult, ReferenceLogits, compare_with_reference
from finetune.inference.rows import read_rows
from finetune.jsonable import from_json
from finetune.model.spec import read_spec
from finetune.trust import check_remote_code


def remeasure(request: dict[str, Any]) -> KLResult:
    """Compares the model in a folder with the reference that an earlier process recorded."""
    import torch

    from finetune.quantization.bnb import quiet_imports

    quiet_imports()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = read_spec(request["spec"])
    folder, placement = spec.base.folder, spec.placement
    torch.set_num_threads(placement.threads)
    check_remote_code(folder, spec.config.remote_code)
    AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, placement.dtype),
        attn_implementation=placement.attention,
        device_map={"": placement.device},
        trust_remote_code=spec.config.trust_remote_code,
    )
    rows = read_rows(Path(request["heldout"]), limit=request["rows"])
    reference = from_json(ReferenceLogits, request["reference"])
    return compare_with_reference(model, rows, reference, batch_tokens=request["batch_tokens"])


if __name__ == "__main__":
    serve_request(remeasure)
