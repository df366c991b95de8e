"""Published figures, read as a comparison reads them. The rows are litgpt's, PEFT's and transformers' own
statements."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.published_figures import compare, find_architecture, unplanned
from finetune.parameters import parameters
from tests.fixtures.architectures import MODELS, architecture

ROOT = Path(__file__).parents[2]
KNOWN = {
    name: architecture(name) for name in ("llama2_7b", "llama2_13b", "llama1_7b", "llama2_70b", "mixtral_8x7b", "phi15")
}


def row(**changes: Any) -> dict[str, Any]:
    """Llama 2 13B with LoRA in litgpt: 38.12 GB on an A100. Source: litgpt tutorials/resource-tables.md."""
    start = {
        "id": 67,
        "model": "Llama 2 13 B",
        "params_b": 13.016,
        "method": "lora",
        "quantisation": None,
        "lora_rank": 8,
        "lora_targets": "query+value (trainable = 6,553,600)",
        "batch_per_gpu": 1,
        "seq_len": 1304,
        "optimizer": "AdamW",
        "gradient_checkpointing": False,
        "n_gpus": 1,
        "gpu": "A100 40GB",
        "reported": 38.12,
        "unit": "GB",
        "kind": "max GPU RAM",
        "source": "github Lightning-AI/litgpt @ 26857050 tutorials/resource-tables.md",
        "unknown_conditions": [],
        "fits": True,
    }
    return start | changes


def test_a_published_figure_is_met_within_a_tenth() -> None:
    found = compare(row(), KNOWN)
    assert found.error is not None
    assert found.error < 0.1
    assert found.planned_fits is True


def test_a_published_failure_is_foreseen() -> None:
    found = compare(row(batch_per_gpu=2, reported=None, kind="OOM", fits=False), KNOWN)
    assert (found.fits, found.planned_fits, found.error) == (False, False, None)


def test_two_gpus_in_shards_are_met_within_a_sixth() -> None:
    # 35.6 GB: huggingface/peft docs/source/accelerate/fsdp.md, read off nvidia-smi.
    peft = row(
        model="Llama-2-70B",
        params_b=68.977,
        method="qlora",
        quantisation="nf4 + double quant, bf16 storage",
        lora_targets="all-linear",
        batch_per_gpu=2,
        seq_len=2048,
        gradient_checkpointing=True,
        n_gpus=2,
        gpu=None,
        reported=35.6,
        kind="per GPU",
        fits=None,
        source="github huggingface/peft @ 5d602fd docs",
        sharding="fsdp full_shard",
        cpu_offload=False,
    )
    assert compare(peft, KNOWN).error == pytest.approx(0, abs=1 / 6)


def test_two_bits_take_half_of_four() -> None:
    # 4 GB and 6 GB for a 7B: LLaMA-Factory's README.
    table = row(
        model="7B (generic)",
        params_b=7,
        method="qlora",
        kind="rule-of-thumb estimate",
        gpu=None,
        fits=None,
        source="github x/y @ 1",
        gradient_checkpointing=None,
        seq_len=None,
        lora_targets=None,
    )
    two, four = (
        compare(table | {"quantisation": f"{bits}-bit", "reported": gb}, KNOWN) for bits, gb in ((2, 4), (4, 6))
    )
    assert two.error is not None
    assert two.error < 0.15
    assert four.planned_bytes - two.planned_bytes == pytest.approx(7e9 / 4, rel=0.2)


@pytest.mark.parametrize(
    ("name", "key"),
    [("Llama-2-7B", "llama2_7b"), ("Llama 2 7 B", "llama2_7b"), ("LLaMA-7B", "llama1_7b"), ("phi-1.5 1.3 B", "phi15")],
)
def test_names_are_read_as_people_write_them(name: str, key: str) -> None:
    assert find_architecture(name, 0, KNOWN) == KNOWN[key]


def test_an_unknown_name_gets_layers_until_it_is_as_large() -> None:
    assert parameters(find_architecture("9B (generic)", 9, KNOWN)) == pytest.approx(9e9, rel=0.03)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"unit": "KB"}, "unit KB is none of"),
        ({"method": "load only", "quantisation": "fp8"}, "a model of 13.016 B in fp8"),
        ({"method": "qlora", "quantisation": "gptq 4-bit"}, "quantisation gptq 4-bit is not one"),
        ({"method": "qlora", "quantisation": "nf4"}, None),
        ({"method": "full (bf16)", "quantisation": None}, None),
    ],
)
def test_a_row_without_a_plan_says_why(change: dict[str, Any], why: str | None) -> None:
    found = unplanned(row(**change))
    assert found == why if why is None else why in str(found)


def test_the_script_ends_with_one_line_of_json(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": [row(), row(unit="KB")]}))
    command = [sys.executable, "-m", "benchmarks.check_plan", str(file), "--rows"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    last = json.loads(done.stdout.splitlines()[-1])
    assert done.stdout.startswith("row 67 is left out: unit KB")
    assert set(last) == {"rows", "median_error", "p90_error", "fit_verdicts_right"}
    assert last["rows"] == 1
    assert MODELS.is_dir()
