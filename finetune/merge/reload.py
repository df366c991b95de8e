"""Run as ``python -m finetune.merge.reload``: loads a merged folder with plain transformers and measures it again."""

from pathlib import Path
from typing import Any

from finetune.inference.dense import place
from finetune.inference.fresh_process import serve_request
from finetune.inference.kl_divergence import ReferenceLogits, compare_with_reference
from finetune.inference.oom import halve_batches
from finetune.inference.rows import loss_workload, read_rows
from finetune.jsonable import from_json
from finetune.model.load import weights_at
from finetune.model.spec import read_spec
from finetune.trust import check_remote_code


def remeasure(request: dict[str, Any]) -> dict[str, Any]:
    """Compares the model in a folder with the reference that an earlier process recorded.

    Returns:
        The `KLResult` as ``result``, and ``halvings``.
    """
    import torch

    from finetune.quantization.bnb import quiet_imports

    quiet_imports()
    from transformers import AutoTokenizer

    from finetune.model.text_only import from_pretrained

    spec = read_spec(request["spec"])
    folder, placement = spec.base.folder, spec.placement
    torch.set_num_threads(placement.threads)
    check_remote_code(folder, spec.config.remote_code)
    AutoTokenizer.from_pretrained(folder)
    rows = read_rows(Path(request["heldout"]), limit=request["rows"])
    placed = place(spec, loss_workload(rows, batch_tokens=request["batch_tokens"]))
    where = weights_at(placed.max_memory, scratch=request["scratch"]) or {"device_map": {"": placement.device}}
    model = from_pretrained(
        folder,
        dtype=getattr(torch, placement.dtype),
        attn_implementation=placement.attention,
        trust_remote_code=spec.config.trust_remote_code,
        **where,
    )
    reference = from_json(ReferenceLogits, request["reference"])
    with halve_batches("merge") as halvings:
        result = compare_with_reference(model, rows, reference, batch_tokens=request["batch_tokens"])
    return {"result": result, "halvings": halvings.count}


if __name__ == "__main__":
    serve_request(remeasure)
