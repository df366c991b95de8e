"""Kills a training at random moments until it finishes, and compares its adapter with that of an uninterrupted one.

python scripts/check_resume.py [moments=20] [seed=0] [steps=120] [dropout=0.1]

The model is a random Llama of two layers in NF4, so that the life of a process is little more than its imports. Each
life is ended by TERM, INT or KILL, while it starts, trains, evaluates or writes a checkpoint. If a run finishes before
all moments are used, another one starts. The last line is JSON; ``late`` counts signals that came when training was
done, or that had no effect.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "data" / "quickstart"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
POLL_SECONDS = 0.02
STARTING_SHARE = 0.15
"""Share of the moments that lie before training begins, where there is little to lose."""
LONGEST_LIFE_SECONDS = 600


@dataclasses.dataclass(kw_only=True)
class Settings:
    """What the command line may set."""

    moments: int = 20
    seed: int = 0
    steps: int = 120
    dropout: float = 0.1


@dataclasses.dataclass(kw_only=True)
class Life:
    """One process of a run.

    Attributes:
        code: Its exit code; negative where a signal ended it.
        sent: The signal that it was sent, None where it came to its end before.
        training: Whether it had begun to train by then.
        seconds: To its end.
        start_seconds: To its first logged step; None where there was none.
    """

    code: int
    sent: signal.Signals | None
    training: bool
    seconds: float
    start_seconds: float | None


def main() -> int:
    settings = read(sys.argv[1:])
    # A shell's background job ignores INT, and the processes that it starts would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chance = random.Random(settings.seed)
    with tempfile.TemporaryDirectory(prefix="check_resume-") as name:
        folder = Path(name)
        base = make_base(folder / "base")
        whole = live(folder, "whole", base=base, settings=settings)
        expected = result(folder / "whole")
        start = f"{whole.start_seconds or 0:.0f} s of them until the first step"
        print(f"uninterrupted: {whole.seconds:.0f} s, {start}; {expected[:16]}", flush=True)
        training_seconds = whole.seconds - (whole.start_seconds or 0)
        kills: collections.Counter[str] = collections.Counter()
        while_training, late, runs, unequal = 0, 0, 0, []
        while kills.total() < settings.moments:
            runs += 1
            run = f"run{runs}"
            while True:
                last = kills.total() >= settings.moments
                moment = None if last else (chance.random() < STARTING_SHARE, chance.random(), chance.choice(SIGNALS))
                life = live(
                    folder,
                    run,
                    base=base,
                    settings=settings,
                    moment=moment,
                    whole=whole,
                    stretch=2 * training_seconds / settings.moments,
                )
                if life.code == 0:
                    late += life.sent is not None
                    break
                assert life.sent is not None, "live() ends the check if a process fails by itself"
                kills[life.sent.name] += 1
                while_training += life.training
                count = f"{kills.total():3} of {settings.moments}"
                print(f"{count}: {life.sent.name} {where(folder / run, life)}, exit {life.code}", flush=True)
            got = result(folder / run)
            unequal += [] if got == expected else [run]
            print(f"{run} came to its end: {'equal' if got == expected else f'DIFFERENT: {got[:16]}'}", flush=True)
    verdict = {
        "kills": kills.total(),
        "signals": dict(sorted(kills.items())),
        "while_training": while_training,
        "runs": runs,
        "late": late,
        "equal": not unequal,
        "sha256": expected,
    }
    print(json.dumps(verdict))
    return 1 if unequal else 0


def read(arguments: list[str]) -> Settings:
    """Parses ``name=value``, as other commands do."""
    settings = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    known = {name: type(value) for name, value in dataclasses.asdict(Settings()).items()}
    unknown = [argument for argument in arguments if argument.split("=", 1)[0] not in known]
    if unknown:
        sys.exit(f"check_resume: {', '.join(unknown)} is not one of {', '.join(f'{name}=' for name in known)}")
    return Settings(**{name: known[name](value) for name, value in settings.items()})


def live(
    folder: Path,
    run: str,
    *,
    base: Path,
    settings: Settings,
    moment: tuple[bool, float, signal.Signals] | None = None,
    whole: Life | None = None,
    stretch: float = 0.0,
) -> Life:
    """Starts or resumes a run, and ends it at a moment: (during the start, share of the stretch, signal)."""
    metrics = folder / run / "train" / "metrics.jsonl"
    started = time.monotonic()
    with open(folder / f"{run}.log", "a") as log:
        process = subprocess.Popen(
            command(folder, run, base=base, settings=settings),
            cwd=ROOT,
            env=environment(folder),
            stdout=log,
            stderr=log,
        )
        began = time.time()
        begun: float | None = None
        sent = None
        while process.poll() is None:
            now = time.monotonic()
            if begun is None and last_figure(metrics) > began:
                begun = now
            if now - started > LONGEST_LIFE_SECONDS:
                process.kill()
                sys.exit(f"check_resume: {run} took longer than {LONGEST_LIFE_SECONDS} s")
            if moment is not None and sent is None and whole is not None:
                starting, share, wish = moment
                due = (
                    started + share * (whole.start_seconds or 0)
                    if starting
                    else begun + share * stretch
                    if begun
                    else None
                )
                if due is not None and now >= due:
                    process.send_signal(wish)
                    sent = wish
            time.sleep(POLL_SECONDS)
    if sent is None and process.returncode:
        sys.exit(f"check_resume: {run} ended with {process.returncode}:\n{(folder / f'{run}.log').read_text()[-3000:]}")
    return Life(
        code=process.returncode,
        sent=sent,
        training=begun is not None,
        seconds=time.monotonic() - started,
        start_seconds=begun - started if begun else None,
    )


def last_figure(metrics: Path) -> float:
    """When a run last wrote down a step, in seconds since 1970; 0 where it has not."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    return float(json.loads(whole[-1])["time"]) if whole else 0.0


def command(folder: Path, run: str, *, base: Path, settings: Settings) -> list[str]:
    """Builds the real command line, up to the end of training."""
    return [
        sys.executable,
        "-m",
        "finetune",
        "+experiment=quickstart",
        "model=custom",
        f"model.name={base}",
        "preflight=off",
        "tracking=[]",
        "hardware.threads=1",
        f"run.root={folder}",
        f"run.name={run}",
        "run.if_exists=resume",
        "run.until=train",
        "data.limit=160",
        "data.cache=''",
        f"data.path={ROWS / 'train.jsonl'}",
        f"data.heldout_path={ROWS / 'heldout.jsonl'}",
        "data.max_tokens=512",
        "data.pack_tokens=512",
        f"train.steps={settings.steps}",
        "train.tokens_per_step=1024",
        f"train.checkpoints={settings.steps // 4}",
        "train.select=best",
        f"train.evaluations={settings.steps // 12}",
        "train.evaluation_rows=4",
        f"lora.dropout={settings.dropout}",
        "lora.rank=8",
    ]


def environment(folder: Path) -> dict[str, str]:
    """Returns the environment with one thread: sums in one order, and little load on the machine."""
    own = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "FINETUNE_CACHE": str(folder / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {**os.environ, **own, "PYTHONPATH": str(ROOT)}


def result(run: Path) -> str:
    """Hash of a finished run's adapter."""
    manifest = json.loads((run / "train" / "manifest.json").read_text())
    return str(manifest["product"]["adapter_sha256"])


def where(run: Path, life: Life) -> str:
    """Returns what a life left to continue from."""
    if not life.training:
        return "before training began"
    checkpoints = sorted(
        (run / "train" / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])
    )
    if not checkpoints:
        return "while training, before the first checkpoint"
    newest = checkpoints[-1]
    return f"while training, at {newest.name}{'' if (newest / 'seal.json').is_file() else ' half written'}"


def make_base(folder: Path) -> Path:
    """Makes a random Llama of two layers and a byte-level tokenizer from the quickstart's rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw: Any = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator((ROWS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:500], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|pad|>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
