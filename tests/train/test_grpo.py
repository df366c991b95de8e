"""GRPO and its variants on a tiny NF4 model: TRL's loss and gradient, seeded samples, and an exact resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from finetune.errors import Interrupted
from finetune.inference import generation
from finetune.inference import sampling as sampling_module
from finetune.inference.collate import Collator
from finetune.inference.sampling import Sampling, sample, seed_of
from finetune.train.grpo_trainer import GRPOTrainer
from finetune.train.policy_loss import advantages, normalizer, policy_losses
from finetune.train.preference import token_losses
from tests.fixtures.preference_training import Collected
from tests.fixtures.prompts import samples_of, train_on_rewards
from tests.fixtures.trl_oracle import COMMON, PLAIN, compared, difference, lora_config, moved_adapter, nf4_in_float32

LIMIT, GROUP = 16, 4
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "rloo": {},
}
PROMPTS = [{"prompt": [{"role": "user", "content": f"Wake me at {n}" + " please" * (n % 3)}]} for n in range(8)]


def distinct(prompts: Any, completions: Any, **_: Any) -> list[float]:
    return [len(set(answer[0]["content"])) / 30 for answer in completions]


def document(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    ids = prompt + answer
    return {"input_ids": ids, "labels": [-100] * len(prompt) + answer, "seq_lengths": [len(ids)]}


@pytest.mark.parametrize(("loss", "beta"), [*((name, 0.0) for name in VARIANTS), ("grpo", 0.04), ("dapo", 0.04)])
def test_loss_gradient_and_advantages_are_those_of_trl(
    loss: str, beta: float, tiny_base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer_class, config = (RLOOTrainer, RLOOConfig) if loss == "rloo" else (GRPOTrainer, GRPOConfig)
    settings = {**COMMON, **VARIANTS[loss], "output_dir": str(tmp_path), "beta": beta, "num_generations": GROUP}
    trainer: Any = trainer_class(
        model=nf4_in_float32(tiny_base),
        args=config(per_device_train_batch_size=2 * GROUP, max_completion_length=LIMIT, **settings),
        train_dataset=Dataset.from_list(PROMPTS),
        reward_funcs=[distinct],
        processing_class=tokenizer,
        peft_config=lora_config(),
    )
    adapter = moved_adapter(trainer.model, scale=0.02)
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    torch.manual_seed(4)
    batch = trainer._generate_and_score_completions([PROMPTS[number // GROUP] for number in range(2 * GROUP)])
    theirs = trainer.compute_loss(model, batch)
    their_gradients = torch.autograd.grad(theirs, adapter)
    rows = []
    for prompt, shown, answer, kept in zip(
        batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], strict=True
    ):
        rows.append(document(prompt[shown.bool()].tolist(), answer[kept.bool()].tolist()))
    tokens = batch["completion_mask"].sum(1)
    assert len(set(tokens.tolist())) > 1  # answers of one length could not tell the variants apart
    answers = [[token for token in row["labels"] if token != -100] for row in rows]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    rewards = torch.tensor(distinct(None, [[{"content": text}] for text in texts])).view(2, GROUP)
    advantage = advantages(rewards, loss=loss).flatten()
    assert torch.allclose(advantage, batch["advantages"], atol=1e-5)
    size = normalizer(answers=len(rows), tokens=int(tokens.sum()), limit=LIMIT, loss=loss)
    for flat in (False, True):
        inputs = Collator(flat=flat, pad_token_id=0)(rows)
        inputs.pop("padding")
        with torch.no_grad(), model.disable_adapter():
            reference = -token_losses(model, None, inputs, PLAIN)
        logprobs = -token_losses(model, None, inputs, PLAIN)
        ours = policy_losses(logprobs, advantage, tokens, loss=loss, reference=reference, beta=beta) / size
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-6, rel=1e-5)
        # The estimate of the divergence is a difference of nearly equal terms: its gradient rounds at 1e-4.
        gradients, bound = torch.autograd.grad(ours, adapter), 1e-3 if beta else 1e-5
        assert compared(f"{loss} beta={beta} flat={flat}", theirs, ours, their_gradients, gradients) < bound


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"top_p": 0.6}])
def test_an_answer_is_the_same_alone_and_in_a_batch_and_has_the_trainers_log_probabilities(
    settings: dict[str, float], tiny_base: Path, tokenizer: Any
) -> None:
    from peft import get_peft_model

    model = get_peft_model(nf4_in_float32(tiny_base), lora_config())
    moved_adapter(model)
    sampling = Sampling(max_new_tokens=12, batch_rows=8, **settings)
    prompts = [tokenizer(text).input_ids for text in ("Wake me", "Book a table for two people", "What is", "Paris")]
    seeds = [seed_of(1, 0, row, 0) for row in range(4)]
    together = sample(model, prompts, seeds, sampling=sampling, ends=[2])
    assert model.training
    assert together == sample(model, prompts, seeds, sampling=sampling, ends=[2])
    assert len({tuple(one.tokens) for one in together}) == 4
    for prompt, seed, one in zip(prompts, seeds, together, strict=True):
        alone = sample(model, [prompt], [seed], sampling=sampling, ends=[2])[0]
        assert alone.tokens == one.tokens
        ids = torch.tensor([prompt + one.tokens])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / sampling.temperature
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(one.tokens)[:, None])[:, 0]
        assert torch.tensor(one.logprobs) == pytest.approx(expected.detach(), abs=1e-4)
        assert one.ended == (one.tokens[-1] == 2)
        if sampling.top_p < 1:
            probabilities = logits.softmax(-1)
            chosen = probabilities.gather(-1, torch.tensor(one.tokens)[:, None])
            more_likely = (probabilities * (probabilities > chosen)).sum(-1)
            assert bool((more_likely < sampling.top_p).all())


@pytest.mark.parametrize("window", [None, 4])
def test_a_group_reads_its_prompt_once_and_samples_the_same(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that see a window of four tokens keep less of the prompt than the others."""
    torch.manual_seed(1)
    sliding = {"sliding_window": window, "layer_types": ["sliding_attention", "full_attention"]} if window else {}
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, use_sliding_window=bool(window), **sliding,
        )
    ).eval()  # fmt: skip
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]
    rows, seeds = [prompt for prompt in prompts for _ in range(3)], [seed_of(number) for number in range(6)]
    read: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].numel()))
    sampling = Sampling(max_new_tokens=8, batch_rows=6, temperature=0.5)
    shared = sample(model, rows, seeds, sampling=sampling, ends=[2])
    assert read[:2] == [2 * 6, 6], "six tokens of both prompts, then the last token of each row"
    monkeypatch.setattr(generation, "shared_prefill", lambda *_: None)
    read.clear()
    assert [one.tokens for one in sample(model, rows, seeds, sampling=sampling, ends=[2])] == [
        one.tokens for one in shared
    ]
    assert read[0] == 6 * 7
    assert len({tuple(one.tokens) for one in shared}) > 2


def test_samples_follow_the_models_distribution(tiny_base: Path) -> None:
    model = nf4_in_float32(tiny_base)
    draws = sample(
        model,
        [[5, 6, 7]] * 2048,
        [seed_of(7, number) for number in range(2048)],
        sampling=Sampling(max_new_tokens=1, batch_rows=512, temperature=0.2),
        ends=[2],
    )
    counts = torch.bincount(torch.tensor([one.tokens[0] for one in draws]), minlength=512) / 2048
    expected = (model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1] / 0.2).softmax(-1).detach()
    assert float(expected.max()) > 0.02
    assert float((counts - expected).abs().max()) < 5 * float((expected.max() / 2048).sqrt())


def test_the_reward_rises_and_every_figure_is_logged(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    """At this temperature: the logits of a random model are too small to prefer anything at 1."""
    trackers = Collected()
    overrides = ["train.steps=16", "train.micro_batch=24", "train.grpo.temperature=0.25", "optim.learning_rate=5e-3"]
    product = train_on_rewards(
        tmp_path, tiny_base=tiny_base, tokenizer=tokenizer, trackers=trackers, overrides=overrides
    )
    rewards = trackers.series("train/reward")
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1
    lines = [line for _, line in trackers.lines if "train/loss" in line]
    assert len(lines) == product.steps == 16
    names = {"reward_format", "reward_length", "entropy", "cut", "answer_tokens", "dead_groups"}
    names |= {"sampler_gap", "sampling_seconds", "reward_seconds", "reward_errors"}
    assert {f"train/{name}" for name in names} <= set(lines[0])
    measured = {step: line["train/kl"] for step, line in trackers.lines if "train/kl" in line}
    assert sorted(measured) == [1, 8, 16], "without a weight, the divergence is measured at the evaluations only"
    assert measured[1] == 0.0
    assert measured[16] > 0
    assert lines[0]["train/sampler_gap"] < 0.1
    assert len(trackers.series("eval/reward")) == 2
    samples = samples_of(tmp_path)
    assert len(samples) == 16 * 4 * 6
    step = [line for line in samples if line["step"] == 1]
    assert sum(line["reward"] for line in step) / len(step) == pytest.approx(rewards[0])
    assert all(line["reward"] == line["scores"]["format"] for line in samples)


def test_answers_that_cannot_teach_are_not_computed(
    tmp_path: Path, tiny_base: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gradient is exactly 0, so a step that computes them all ends in the same adapter."""
    overrides = ["train.steps=3", "train.micro_batch=24", "train.evaluations=0"]
    trackers = Collected()
    some = train_on_rewards(
        tmp_path / "some", tiny_base=tiny_base, tokenizer=tokenizer, trackers=trackers, overrides=overrides,
        dtype="float32",
    )  # fmt: skip
    answers = [line for line in samples_of(tmp_path / "some") if line["step"] == 2]
    live = [line for line in answers if line["advantage"]]
    assert 0 < len(live) < len(answers) == 24
    assert 0 < trackers.series("train/dead_groups")[1] < 1
    monkeypatch.setattr(GRPOTrainer, "micro_batches", all_answers)
    whole = train_on_rewards(
        tmp_path / "all", tiny_base=tiny_base, tokenizer=tokenizer, overrides=overrides, dtype="float32"
    )
    assert some.trained_tokens < whole.trained_tokens
    adapters = [load_file(one.folder / "adapter/adapter_model.safetensors") for one in (some, whole)]
    assert difference(list(adapters[0].values()), list(adapters[1].values())) < 1e-2


def all_answers(trainer: Any, completions: Any, *, count: int) -> list[Any]:
    assert count == 1
    return [trainer.data_collator.collate.answers(completions)]


def test_a_step_is_the_same_however_its_answers_are_divided(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    """Neither prompts nor answers need to be a multiple of the micro-batch."""
    found = []
    for micro in (1, 5, 18):
        trackers, folder = Collected(), tmp_path / str(micro)
        overrides = ["train.steps=1", f"train.micro_batch={micro}", "train.rows_per_step=3", "train.evaluations=0"]
        train_on_rewards(folder, tiny_base=tiny_base, tokenizer=tokenizer, trackers=trackers, overrides=overrides)
        found.append((samples_of(folder), trackers.series("train/grad_norm")[0]))
    assert found[0][0] == found[1][0] == found[2][0]
    assert len(found[0][0]) == 18
    assert found[0][1] > 0
    assert [norm for _, norm in found] == [pytest.approx(found[0][1], rel=0.05)] * 3  # bfloat16


def test_sampling_that_runs_out_of_memory_continues_with_half_of_a_batch(
    tmp_path: Path, tiny_base: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["train.steps=2", "train.micro_batch=24", "train.evaluations=0"]
    inputs: dict[str, Any] = {"tiny_base": tiny_base, "tokenizer": tokenizer, "overrides": overrides}
    train_on_rewards(tmp_path / "ample", **inputs, dtype="float32")
    batches: list[int] = []
    generate = sampling_module.generate_tokens

    def scarce(model: Any, prompts: Any, **settings: Any) -> Any:
        batches.append(len(prompts))
        if len(prompts) > 8:
            raise MemoryError("no room")
        return generate(model, prompts, **settings)

    monkeypatch.setattr(sampling_module, "generate_tokens", scarce)
    train_on_rewards(tmp_path / "scarce", **inputs, dtype="float32")
    assert batches == [24, 12, 6, 6, 6, 6, 8, 8, 8], "the second step starts with what fits"
    assert "out of memory with 24 rows (no room): continues with half" in " ".join(capsys.readouterr().out.split())
    drawn = [[(line["row"], line["answer"]) for line in samples_of(tmp_path / name)] for name in ("ample", "scarce")]
    assert drawn[0] == drawn[1]


def test_interrupted_and_resumed_ends_as_if_it_had_not_been(tmp_path: Path, tiny_base: Path, tokenizer: Any) -> None:
    whole = train_on_rewards(tmp_path / "a", tiny_base=tiny_base, tokenizer=tokenizer)
    with pytest.raises(Interrupted):
        train_on_rewards(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer, trackers=Collected(stop_at=3))
    resumed = train_on_rewards(tmp_path / "b", tiny_base=tiny_base, tokenizer=tokenizer)
    assert resumed.resumed_from > 0
    assert resumed.adapter_sha256 == whole.adapter_sha256
    assert samples_of(tmp_path / "b") == samples_of(tmp_path / "a")
