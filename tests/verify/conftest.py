"""A run with the figures that an evaluation leaves, and the model behind them, ready to be served with faults."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs pip install 'finetune-qlora[serve]'")

import finetune
from finetune.eval.metrics import METRICS
from finetune.eval.records import RecordFile
from finetune.inference.adapted import add_adapter
from finetune.inference.chat import Chat
from finetune.inference.generation import generate
from finetune.inference.losses import row_losses
from finetune.inference.rows import read_rows
from finetune.run import write_json
from finetune.serve.graphs import ServedModel
from finetune.serve.transformers_engine import TransformersEngine
from tests.fixtures.artifacts import Made
from tests.fixtures.served import served_line, served_run

__all__ = ["served_line", "served_run"]

LIMIT = 16
METRIC = "rouge_1"
END = 2


@dataclass(frozen=True)
class Models:
    """The trained graph with a second adapter, and the merged model; ``ends`` are the tokens that end answers."""

    adapted: Any
    merged: Any
    tokenizer: Any
    ends: list[int]

    def engine(self, *, ends: list[int] | None = None) -> TransformersEngine:
        """Returns an engine with all models, which stops at the right tokens or others."""
        chat = Chat(tokenizer=self.tokenizer, ends=self.ends if ends is None else ends, system=None)
        models = [
            ServedModel(name="tiny", graph=self.adapted, adapter="default"),
            ServedModel(name="base", graph=self.adapted, adapter=None),
            ServedModel(name="second", graph=self.adapted, adapter="other"),
            ServedModel(name="merged", graph=self.merged, adapter=None),
        ]
        return TransformersEngine(chat, models, concurrent=2, cache_bytes=1 << 28)


@pytest.fixture(scope="session")
def models(served_run: Path, heldout: Made) -> Models:
    """A random model ends no answer, so the two tokens that most answers have become end tokens."""
    adapted, tokenizer = finetune.load(served_run)
    merged, _ = finetune.load(served_run / "export" / "safetensors")
    prompts = [row["prompt_ids"] for row in read_rows(heldout.folder / "heldout")]
    answers = generate(adapted, tokenizer, prompts, max_new_tokens=LIMIT, batch_rows=1, ends=[END])
    common = Counter(token for answer in answers for token in {*answer.tokens[3:]} - {*answer.tokens[:3]})
    ends = [END, *[token for token, _ in common.most_common(2)]]
    add_adapter(adapted, served_run.parent / "others" / "second", name="other")
    adapted.set_adapter("default", inference_mode=True)
    return Models(adapted, merged, tokenizer, ends)


@pytest.fixture(scope="session")
def verified_run(models: Models, served_run: Path, heldout: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run named tiny whose adapter, quantized base and merged model were measured on ten rows."""
    run = tmp_path_factory.mktemp("verified") / "tiny"
    (run / "eval").mkdir(parents=True)
    (run / "data").mkdir()
    for name in ("export", "model"):
        shutil.copytree(served_run / name, run / name)
    for export in ("adapter", "safetensors"):
        record = json.loads((run / "export" / export / "finetune.json").read_text())
        record["tokenizer"]["eos"]["ends_an_answer"] = models.ends
        write_json(run / "export" / export / "finetune.json", record)
    (run / "data" / "heldout").symlink_to(heldout.folder / "heldout")
    rows = read_rows(heldout.folder / "heldout")
    longest = max(len(row["input_ids"]) for row in rows)
    write_json(run / "data" / "lengths.json", {"longest": longest + 40})
    write_json(run / "eval" / "manifest.json", {})
    config = {"run": {"seed": 1}, "eval": {"metrics": [METRIC], "max_new_tokens": LIMIT}}
    (run / "config.yaml").write_text(json.dumps(config))
    texts = {"adapter": _measure(run, "adapter", models.adapted, models, rows)}
    with models.adapted.disable_adapter():
        texts["base_quantized"] = _measure(run, "base_quantized", models.adapted, models, rows)
    texts["merged"] = _measure(run, "merged", models.merged, models, rows)
    lines = [{name: written[number] for name, written in texts.items()} for number in range(len(rows))]
    (run / "eval" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert METRIC in METRICS
    return run


def _measure(run: Path, name: str, model: Any, models: Models, rows: list[dict[str, Any]]) -> list[str]:
    """Writes losses and answers as the evaluation does; returns the answers as text."""
    record = RecordFile(run / "eval" / f"{name}.rows.jsonl", key="")
    record.add_losses(row_losses(model, rows, batch_tokens=256))
    prompts = [row["prompt_ids"] for row in rows]
    answers = generate(model, models.tokenizer, prompts, max_new_tokens=LIMIT, batch_rows=1, ends=models.ends)
    for number, answer in enumerate(answers):
        record.add_answer(number, answer)
    return [models.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers]


@pytest.fixture(scope="session")
def engine(models: Models) -> Iterator[TransformersEngine]:
    """The models as they were measured."""
    engine = models.engine()
    yield engine
    engine.close()
