"""`finetune bench data`: compares data preparation with TRL's and with the bare tokenizer, on the same rows in one run.

Each contender works in its own process, so that memory is counted separately. Memory is that of the process and its
children together, with shared pages counted once (proportional set size, where the system reports it).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from finetune.console import human_bytes, log, table
from finetune.errors import DataError

MAX_TOKENS = 1024
SAMPLE_SECONDS = 0.1
TOKENIZER_BATCH_ROWS = 1000
CONTENDERS = ("bare", "ours", "trl", "trl_processes")
NAMES = {
    "bare": "bare batch tokenizer",
    "ours": "finetune",
    "trl": "TRL, as it comes",
    "trl_processes": "TRL, one process per core",
}


def compare_data_preparation(source: Path, *, tokenizer: str, rows: int = 100_000) -> dict[str, float]:
    """Measures all contenders and prints a table; the last line printed is the result as JSON.

    Args:
        source: GSM8K's ``train.jsonl`` or another file with ``question`` and ``answer``; repeated with other numbers in
            it.
        tokenizer: Folder or name of a tokenizer with a chat template.
        rows: Number of rows to make.

    Returns:
        ``rows_per_second_ratio`` (to TRL as it comes), ``share_of_tokenizer_speed``, ``peak_memory_ratio`` and more.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-bench-") as scratch:
        folder = Path(scratch)
        write_rows(source, folder / "rows.jsonl", rows=rows)
        results = {name: _measure(name, folder, tokenizer) for name in CONTENDERS}
    speed = {name: rows / result["seconds"] for name, result in results.items()}
    table(
        "bench",
        ["", "rows/s", "seconds", "processor seconds", "peak memory", "above its start"],
        [
            [
                NAMES[name],
                f"{speed[name]:,.0f}",
                f"{result['seconds']:.1f}",
                f"{result['processor']:.1f}",
                human_bytes(result["peak"]),
                human_bytes(result["peak"] - result["start"]),
            ]
            for name, result in results.items()
        ],
    )
    result = {
        "rows_per_second_ratio": round(speed["ours"] / speed["trl"], 3),
        "share_of_tokenizer_speed": round(speed["ours"] / speed["bare"], 3),
        "peak_memory_ratio": round(results["ours"]["peak"] / results["trl"]["peak"], 3),
        "rows_per_second_ratio_same_processes": round(speed["ours"] / speed["trl_processes"], 3),
        "processor_seconds_ratio": round(results["trl"]["processor"] / results["ours"]["processor"], 3),
        "cached_start_seconds": round(results["ours"]["again"], 3),
        "rows": rows,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    return result


def write_rows(source: Path, target: Path, *, rows: int, seed: int = 0) -> None:
    """Writes prompt and completion as messages; every repetition has other numbers in it, so no two rows are equal."""
    try:
        originals = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        pairs = [(row["question"], row["answer"]) for row in originals]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{source}: bench data needs JSON Lines with question and answer: {error}; give such a file"
        ) from error
    generator = np.random.default_rng(seed)
    with open(target, "w", encoding="utf-8") as handle:
        for number in range(rows):
            question, answer = (_other_numbers(text, generator) for text in pairs[number % len(pairs)])
            prompt = [{"role": "user", "content": f"{question} ({number})"}]
            handle.write(
                json.dumps({"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}) + "\n"
            )


def _other_numbers(text: str, generator: np.random.Generator) -> str:
    return re.sub(r"\d+", lambda match: str(generator.integers(1, 10 ** len(match.group()) + 1)), text)


def _measure(name: str, folder: Path, tokenizer: str) -> dict[str, float]:
    log("bench", f"{NAMES[name]} ...")
    command = [sys.executable, "-m", "finetune.bench.data", name, str(folder), tokenizer]
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(folder / f"cache-{name}"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    output = folder / f"{name}.log"
    with open(output, "w") as log_file:
        child = subprocess.Popen(command, stdout=log_file, stderr=subprocess.STDOUT, env=environment)
        peak = 0
        while child.poll() is None:
            peak = max(peak, memory_of_tree(child.pid))
            time.sleep(SAMPLE_SECONDS)
    if child.returncode:
        raise DataError(f"bench: {NAMES[name]} ended with {child.returncode}: {output.read_text()[-800:]}")
    return {**json.loads((folder / f"{name}.json").read_text()), "peak": peak}


class Clock:
    """Measures elapsed seconds, and CPU seconds of this process and its ended children."""

    def __init__(self) -> None:
        self.started, self.processor = time.perf_counter(), _processor_seconds()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.started, "processor": _processor_seconds() - self.processor}


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def memory_of_tree(process: int) -> int:
    """Returns bytes that a process and its children use, with each shared page divided among its users."""
    import psutil

    total = 0
    try:
        parent = psutil.Process(process)
        for member in [parent, *parent.children(recursive=True)]:
            info = member.memory_full_info()
            total += getattr(info, "pss", info.rss)
    except psutil.Error:
        return 0
    return total


def _work(name: str, folder: Path, tokenizer_name: str) -> dict[str, float]:
    """Runs one contender, in its own process."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    if name == "ours":
        return _ours(folder, tokenizer)
    if name == "bare":
        return _bare(folder, tokenizer)
    return _trl(folder, tokenizer, processes=os.cpu_count() if name == "trl_processes" else None)


def _ours(folder: Path, tokenizer: Any) -> dict[str, float]:
    """Runs the whole data stage: reading, masks, checks, ledger, packing, preview, writing and caching."""
    from finetune.data import DataConfig, prepare
    from finetune.data.config import CheckConfig

    checks = CheckConfig(
        near_duplicate_similarity=0.8,
        near_duplicate_share=0.05,
        overlap_share=0.5,
        overlap_rows_share=0.0,
        smallest_trained_share=0.05,
        largest_label_share=0.5,
        control_character_share=0.0,
        secret_share=0.0,
        email_share=0.0,
    )
    config = DataConfig(
        path=str(folder / "rows.jsonl"),
        format="auto",
        max_tokens=MAX_TOKENS,
        too_long="drop",
        packing=True,
        bad_rows="error",
        duplicates="drop",
        leaked="drop",
        heldout_rows=200,
        checks=checks,
        cache=str(folder / "cache-ours"),
    )
    start, clock = memory_of_tree(os.getpid()), Clock()
    prepare(config, folder=folder / "first", tokenizer=tokenizer, seed=0)
    first, clock = clock.read(), Clock()
    prepare(config, folder=folder / "second", tokenizer=tokenizer, seed=0)
    return {**first, "start": start, "again": clock.read()["seconds"]}


def _bare(folder: Path, tokenizer: Any) -> dict[str, float]:
    """Tokenizes rendered text, in batches on all cores, and discards the result."""
    start, spent = memory_of_tree(os.getpid()), {"seconds": 0.0, "processor": 0.0}
    with open(folder / "rows.jsonl", encoding="utf-8") as handle:
        while lines := list(islice(handle, TOKENIZER_BATCH_ROWS)):
            rows = map(json.loads, lines)
            texts = [
                tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], tokenize=False) for row in rows
            ]
            clock = Clock()
            tokenizer(texts, add_special_tokens=False)
            for name, seconds in clock.read().items():
                spent[name] += seconds
    return {**spent, "start": start}


def _trl(folder: Path, tokenizer: Any, *, processes: int | None) -> dict[str, float]:
    """Times what SFTTrainer does to its data before the first step, with a tiny model."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    timings: list[dict[str, float]] = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *arguments: Any, **named: Any) -> Any:
            clock = Clock()
            prepared = super()._prepare_dataset(*arguments, **named)
            timings.append(clock.read())
            return prepared

    rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        packing=True,
        max_length=MAX_TOKENS,
        dataset_num_proc=processes,
        report_to="none",
        use_cpu=True,
    )
    start = memory_of_tree(os.getpid())
    Timed(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    return {**timings[0], "start": start}


def _main() -> None:
    name, folder, tokenizer = sys.argv[1:4]
    if name not in CONTENDERS:
        compare_data_preparation(Path(name), tokenizer=folder, rows=int(tokenizer))
        return
    result = _work(name, Path(folder), tokenizer)
    (Path(folder) / f"{name}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _main()
