"""Computes the golden losses in plain transformers and peft, and writes ``losses.json``: no line of our trainer runs.

python -m tests.golden.reference
"""

import hashlib
import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from tests.fixtures.models import make_tokenizer, write_tiny_base
from tests.fixtures.pairs import pairs_of
from tests.fixtures.rows import prepared_rows

LOSSES = Path(__file__).with_name("losses.json")
STEPS = 8
BETA = 0.3
RANK, ALPHA = 4, 8
LEARNING_RATE = 5e-3
MAX_GRAD_NORM = 1.0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Document = tuple[list[int], list[int]]
"""Token ids and labels, -100 where a token is not trained on."""


def fill_adapter(model: Any) -> None:
    """Sets each adapter matrix by integer arithmetic, so that its start is the same everywhere; B is not zero."""
    trained = sorted((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    with torch.no_grad():
        for index, (name, weight) in enumerate(trained):
            values = ((torch.arange(weight.numel()) * 7919 + index * 104729) % 2003).double() / 2003 - 0.5
            weight.copy_(values.reshape(weight.shape) * (0.2 if "lora_A" in name else 0.05))


def documents_of(folder: Path) -> list[Document]:
    """Reads the prepared training documents, cut out of the rows that they are packed into."""
    from datasets import load_from_disk

    documents = []
    for row in load_from_disk(str(folder / "train")):
        start = 0
        for length in row["seq_lengths"]:
            part = slice(start, start + length)
            documents.append((row["input_ids"][part], row["labels"][part]))
            start += length
    return documents


def pairs_in(folder: Path) -> list[tuple[Document, Document]]:
    """Reads the prepared training pairs: the chosen answer and the rejected one."""
    from datasets import load_from_disk

    rows = load_from_disk(str(folder / "train"))
    return [((row["input_ids"], row["labels"]), (row["rejected_input_ids"], row["rejected_labels"])) for row in rows]


def digest(documents: list[Any]) -> str:
    """Hashes documents without their order, which the losses do not depend on: each step reads all of them."""
    return hashlib.sha256("\n".join(sorted(map(json.dumps, documents))).encode()).hexdigest()


def summed_loss(model: Any, document: Document) -> Tensor:
    ids, labels = (torch.tensor([part]) for part in document)
    return cross_entropy(model(input_ids=ids).logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")


def sft_loss(documents: list[Document]) -> Callable[[Any], Tensor]:
    count = sum(label != -100 for _, labels in documents for label in labels[1:])
    return lambda model: sum(summed_loss(model, document) for document in documents) / count


def dpo_loss(pairs: list[tuple[Document, Document]]) -> Callable[[Any], Tensor]:
    def loss(model: Any) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            references = [summed_loss(model, rejected) - summed_loss(model, chosen) for chosen, rejected in pairs]
        margins = [summed_loss(model, rejected) - summed_loss(model, chosen) for chosen, rejected in pairs]
        return -logsigmoid(BETA * (torch.stack(margins) - torch.stack(references))).mean()

    return loss


def train(base: Path, loss: Callable[[Any], Tensor]) -> list[float]:
    """Takes eight full-batch steps of AdamW and returns the loss before each."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    fill_adapter(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        value = loss(model)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def compute(objective: str, data: Path, base: Path) -> dict[str, Any]:
    """Returns the hash of the documents and the losses of an objective."""
    rows: list[Any] = documents_of(data) if objective == "sft" else pairs_in(data)
    loss = sft_loss(rows) if objective == "sft" else dpo_loss(rows)
    return {"documents_sha256": digest(rows), "losses": train(base, loss)}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    import peft
    import transformers

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_tokenizer()
        base = write_tiny_base(folder / "base", tokenizer)
        for part in ("sft", "dpo"):
            (folder / part).mkdir()
        objectives = {
            "sft": compute("sft", prepared_rows(folder / "sft", tokenizer).folder, base),
            "dpo": compute("dpo", pairs_of(folder / "dpo", tokenizer).folder, base),
        }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    origin = {
        "computed_by": "tests/golden/reference.py: transformers, peft and torch.optim.AdamW, without our trainer",
        "processor": processor(),
        "versions": versions,
        "dtype": "float32",
        "tolerance": 1e-5,
    }
    LOSSES.write_text(json.dumps(origin | objectives, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
