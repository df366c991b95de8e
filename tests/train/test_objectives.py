"""ORPO, SimPO and CPO on a tiny NF4 model in float32: loss, gradient and figures are those of TRL's trainers."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from finetune.config import load as load_config
from finetune.errors import ConfigError
from finetune.objectives import OBJECTIVES
from finetune.train.pair_losses import answer_scores, figures, log1mexp, named, pair_losses, rewards
from finetune.train.preference import PairCollator, answer_logprobs, token_losses
from finetune.train.preference_config import PreferenceConfig
from tests.fixtures.pairs import COMPOSED
from tests.fixtures.trl_oracle import COMMON, PLAIN, compared, lora_config, moved_adapter, nf4_in_float32

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
PAIRS = [
    {"prompt": "Wake me at seven.", "chosen": '{"time":7}', "rejected": "no table for two people"},
    {"prompt": "Book a table.", "chosen": "for two people tomorrow", "rejected": "Paris"},
    {"prompt": "What is the capital of France?", "chosen": "Paris", "rejected": "Wake me at seven on Monday"},
]


def trl_trainer(name: str, config: PreferenceConfig, *, base: Path, tokenizer: Any, folder: Path) -> Any:
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    common: dict[str, Any] = {**COMMON, "output_dir": str(folder), "max_length": 256, "max_completion_length": 128}
    settings: dict[str, Any] = {"beta": config.beta, **common}
    if name == "orpo":
        trainer, arguments = ORPOTrainer, ORPOConfig(**settings)
    else:
        loss = "simpo" if name == "simpo" else config.loss
        smoothing = config.label_smoothing
        trainer, arguments = (
            CPOTrainer,
            CPOConfig(
                loss_type=loss,
                label_smoothing=smoothing,
                cpo_alpha=config.likelihood,
                simpo_gamma=config.margin,
                **settings,
            ),
        )
    rows = Dataset.from_list(PAIRS)
    model = nf4_in_float32(base)
    return trainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora_config()
    )


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("orpo", {"beta": 0.3, "likelihood": 1.0}),
        ("simpo", {"beta": 2.0, "margin": 1.0}),
        ("simpo", {"beta": 2.0, "margin": 0.5, "label_smoothing": 0.1, "likelihood": 0.5}),
        ("cpo", {"beta": 0.1, "likelihood": 1.0}),
        ("cpo", {"beta": 0.1, "loss": "hinge", "likelihood": 1.0}),
    ],
)
def test_loss_gradient_and_figures_are_those_of_trl(
    name: str, settings: dict[str, Any], flat: bool, tiny_base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    from trl.trainer.utils import add_fused_lm_head

    config = PreferenceConfig(**settings)
    assert not list(config.problems(name))
    trainer = trl_trainer(name, config, base=tiny_base, tokenizer=tokenizer, folder=tmp_path)
    model = trainer.model.train()
    adapter = moved_adapter(model)
    examples = list(trainer.train_dataset)
    batch = trainer.data_collator(examples)
    theirs = trainer.compute_loss(model, batch)
    their_gradients = torch.autograd.grad(theirs, adapter)
    shown = {key: values[-1] for key, values in trainer._stored_metrics["train"].items()}

    add_fused_lm_head(model.get_base_model())
    rows = [
        {
            "input_ids": example["chosen_input_ids"],
            "labels": example["chosen_labels"],
            "rejected_input_ids": example["rejected_input_ids"],
            "rejected_labels": example["rejected_labels"],
        }
        for example in examples
    ]
    inputs = PairCollator(flat=flat, pad_token_id=0)(rows)
    tokens = inputs.pop("answer_tokens")
    inputs.pop("padding")
    policy = answer_logprobs(token_losses(model, None, inputs, PLAIN), tokens)
    ours = pair_losses(answer_scores(name, policy, None, tokens), tokens, config, name=name).mean()
    likelihood = -policy[0].sum() / tokens[: len(rows)].sum()
    if name == "orpo":  # TRL's likelihood is that of prompt and answer; ours is that of what the masks train
        mask = batch["chosen_attention_mask"]
        labels = batch["chosen_input_ids"].masked_fill(mask == 0, -100)
        likelihood = model(input_ids=batch["chosen_input_ids"], attention_mask=mask, labels=labels).loss
    ours = ours + config.likelihood * likelihood

    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = torch.autograd.grad(ours, adapter)
    assert compared(f"{name} {settings} flat={flat}", theirs, ours, their_gradients, gradients) < 1e-5
    found = named(figures(policy, rewards(name, policy, None, tokens, config), tokens), prefix="train")
    assert found["train/reward_margin"] == pytest.approx(float(shown["rewards/margins"]), rel=1e-4)
    assert found["train/reward_accuracy"] == pytest.approx(float(shown["rewards/accuracies"]))


def test_log_odds_are_finite_at_both_ends_and_so_is_their_gradient() -> None:
    """Certain answers made TRL's ORPO NaN for years (its issues 1473, 2564 and 3237)."""
    values = torch.tensor([-1e-9, -1e-4, -0.5, -0.7, -3.0, -200.0], requires_grad=True)
    results = log1mexp(values)
    exact = torch.log1p(-torch.exp(values.detach().double().clamp(max=-1e-7)))
    assert results.tolist() == pytest.approx(exact.tolist(), rel=1e-5)
    results.sum().backward()
    assert values.grad is not None
    assert torch.isfinite(values.grad).all()


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["train=default"], 'train.objective=sft trains on data.objective=supervised; got preference: for {"prompt",'),
        (["train=default"], "choose train=dpo or train=orpo or train=simpo or train=cpo; or set data.objective=superv"),
        (["train=orpo", "data.objective=supervised"], 'set data.objective=preference, with rows like {"prompt", "cho'),
        (["data.format=messages"], "data.objective=preference: data has the format messages without rejected answers"),
    ],
)
def test_wrong_rows_get_the_remedy_that_fits_the_objective(overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([*COMPOSED, *overrides])
    assert problem in str(caught.value)


def test_noise_is_refused_only_where_a_reference_is_compared() -> None:
    for name, objective in OBJECTIVES.items():
        if objective.pairs:
            composed = [*COMPOSED, f"train={name}", "lora.dropout=0.1"]
            if objective.reference:
                with pytest.raises(ConfigError, match=r"lora\.dropout adds noise"):
                    load_config(composed)
            else:
                assert load_config(composed).lora.dropout == 0.1
