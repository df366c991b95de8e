"""The trainer of answers that the model samples and rewards judge: GRPO and its variants."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from trl.trainer.utils import add_fused_lm_head

from finetune.console import log
from finetune.errors import TrainError
from finetune.inference.bootstrap import RESAMPLES, Bootstrap, mean_of
from finetune.inference.generation import end_tokens, generate
from finetune.inference.logits import unwrap
from finetune.inference.oom import halve_batches
from finetune.inference.rows import IGNORED
from finetune.inference.sampling import Sampling
from finetune.launch.gradients import all_reduce_gradients
from finetune.rewards import Rewards
from finetune.train import rollout
from finetune.train.pair_losses import bounds
from finetune.train.policy_loss import k3, normalizer, policy_losses
from finetune.train.preference import token_losses
from finetune.train.rollout import NUMBER, Completion, Rollout
from finetune.train.sft_trainer import Loader, Trainer

REMEDY = "lower train.grpo.max_new_tokens or data.max_tokens"
GAPS = ("sampler_gap", "sampler_gap_signed")
"""Means over the tokens that are trained on."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Each prompt once for every answer of its group.

    Attributes:
        rows: Prompts.
        group: Answers of each.
    """

    rows: Any
    group: int

    def __len__(self) -> int:
        return len(self.rows) * self.group

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index // self.group], NUMBER: index % self.group}


class GRPOTrainer(Trainer):
    """Samples the answers of each step from the model as it is, and trains on them once."""

    gaps: Any = None
    """Sums of `GAPS` and their tokens since the loss was last logged."""

    divergence: Any = None
    """Likewise, of the KL divergence to the reference."""

    measures_divergence = False
    """Whether this step computes the reference although the loss does not need it."""

    samples: Path | None = None
    """Receives every sampled answer; None writes none."""

    rolled_out: Rollout | None = None
    """The step's answers in this process."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.grpo = self.job.config.grpo
        self.rewards = make_rewards(self.job.config.grpo)
        self.ends = answer_ends(self.job)
        self.temperature = self.grpo.temperature
        if self.temperature != 1:  # the fused loss has none
            add_fused_lm_head(unwrap(self.job.trainable.model), temperature=self.temperature)

    def get_train_dataloader(self) -> Any:
        """Returns a loader of prompts, each once for every answer of its group."""
        rows: Any = Groups(self.train_dataset, self.grpo.group)
        return Loader(rows, batch_sampler=self.sampler, collate_fn=self.collate)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """Reads the prompts of a step, samples and scores their answers, and returns them as micro-batches."""
        batches = list(islice(epoch_iterator, num_batches))
        rows = [row for batch in batches for row in batch.get("prompts", [])]
        done = self.roll_out(rows)
        self.rolled_out, step = done, self.state.global_step + 1
        self.measures_divergence = step == 1 or step % (self.args.eval_steps or self.args.max_steps) == 0
        rollout.write_samples(self.samples, step, done.completions, ranks=self.ranks)
        return self.micro_batches(done.completions, count=len(batches)), self.step_size(done.completions)

    def roll_out(self, rows: Sequence[dict[str, Any]]) -> Rollout:
        """Samples, scores and compares the answers to this process's rows of the current step."""
        seeds = rollout.answer_seeds(rows, seed=self.job.seed, step=self.state.global_step)
        model = self.accelerator.unwrap_model(self.model)
        batch_rows = self.progress.sampling_rows or self.grpo.batch_rows
        with halve_batches("train", remedy=REMEDY) as halvings, self.compute_loss_context_manager():
            done = rollout.run_step(
                model,
                self.job.trainable.tokenizer,
                rows,
                rewards=self.rewards,
                sampling=sampling_of(self.grpo, batch_rows=batch_rows),
                seeds=seeds,
                ends=self.ends,
            )
        if halvings.count:  # later steps, of a resumed run too, start with batches that fit
            self.progress.sampling_rows = max(1, batch_rows >> halvings.count)
        done.dead, done.groups = rollout.compare(done.completions, loss=self.grpo.loss, ranks=self.ranks)
        return done

    def micro_batches(self, completions: Sequence[Completion], *, count: int) -> list[Any]:
        """Divides the answers that are trained on; the last micro-batches may be empty, and are not computed.

        Without a KL term, an answer as good as its group has a gradient of exactly 0. It is left out, except in steps
        that measure the divergence; where no answer is left, the first micro-batch is computed.
        """
        collator: Any = self.data_collator
        size, chosen = self.args.per_device_train_batch_size, list(completions)
        if not self.grpo.beta and not self.measures_divergence:
            chosen = [item for item in completions if item.advantage] or chosen[:size]
        parts = [chosen[start * size : (start + 1) * size] for start in range(count)]
        return [collator.collate.answers(part) if part else self.collate([]) for part in parts]

    def step_size(self, completions: Sequence[Completion]) -> int:
        """Returns what the losses of this step are divided by, over all processes."""
        sizes = self.ranks.all_gather([len(item.sample.tokens) for item in completions])
        answers, tokens = sum(map(len, sizes)), sum(map(sum, sizes))
        return normalizer(answers=answers, tokens=tokens, limit=self.grpo.max_new_tokens, loss=self.grpo.loss)

    def log_probabilities(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Computes the log-probability of each sampled token at the sampling temperature, shape (tokens,)."""
        adapted = self.accelerator.unwrap_model(model)
        if self.temperature == 1:
            return -token_losses(model, adapted, inputs, self.fusion).float()
        logprobs = model(**inputs, fused_lm_head=True).log_probs
        return logprobs[inputs["labels"][:, 1:] != IGNORED].float()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss, divided by ``num_items_in_batch``, the size of the whole accumulated step."""
        batch = dict(inputs)
        tokens, advantages, sampled = (batch.pop(name) for name in ("answer_tokens", "advantages", "sampled"))
        reference = None
        if self.grpo.beta or self.measures_divergence:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                reference = self.log_probabilities(model, batch)
        policy = self.log_probabilities(model, batch)
        gap = policy.detach() - sampled
        self.gaps = _add(self.gaps, gap.abs(), gap)
        if reference is not None:
            self.divergence = _add(self.divergence, k3(policy.detach(), reference))
        losses = policy_losses(
            policy, advantages, tokens, loss=self.grpo.loss, reference=reference, beta=self.grpo.beta
        )
        return losses / num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the figures since the last logged loss, and those of the last step's answers."""
        if "loss" in logs and self.rolled_out is not None:
            logs |= self._means(self.gaps, GAPS) | self._means(self.divergence, ("kl",))
            facts = [
                _facts(item.reward, item.scores, ended=item.sample.ended, tokens=len(item.sample.tokens))
                | {"entropy": item.sample.entropy}
                for item in self.rolled_out.completions
            ]
            parts = [item for part in self.ranks.all_gather(facts) for item in part]
            logs |= {f"train/{name}": value for name, value in figures(parts).items()}
            logs |= {
                "train/dead_groups": self.rolled_out.dead / max(1, self.rolled_out.groups),
                "train/sampling_seconds": self.rolled_out.sampling_seconds,
                "train/reward_seconds": self.rolled_out.reward_seconds,
                "train/reward_errors": float(self.rewards.errors.total()),
            }
            self._log_errors()
            self.gaps = self.divergence = None
        super().log(logs, start_time)

    def _means(self, sums: Any, names: Sequence[str]) -> dict[str, float]:
        """Returns the means over the tokens of all processes; nothing where there are none."""
        values = [0.0] * (len(names) + 1) if sums is None else sums.tolist()
        if self.ranks.count > 1:
            values = all_reduce_gradients([], values, device=str(self.args.device))
        *totals, count = values
        return {f"train/{name}": total / count for name, total in zip(names, totals, strict=True)} if count else {}

    def _log_errors(self) -> None:
        """Logs the first error of each reward once."""
        for name, message in self.rewards.first_error.items():
            if message:
                log("train", f"the reward {name} failed, and counts as {self.grpo.error_value}: {message}")
                self.rewards.first_error[name] = ""

    def held_out_figures(self, model: Any) -> dict[str, float]:
        """Computes the rewards of greedy answers to held-out prompts, their sum with its interval; each process answers
        its share."""
        share = self.held_out[self.ranks.rank :: self.ranks.count]
        with halve_batches("train", remedy=REMEDY):
            answers = generate(
                model,
                self.job.trainable.tokenizer,
                [row["prompt_ids"] for row in share],
                max_new_tokens=self.grpo.max_new_tokens,
                batch_rows=self.progress.sampling_rows or self.grpo.batch_rows,
                ends=self.ends,
            )
        decode = self.job.trainable.tokenizer.decode
        texts = [str(decode(answer.tokens, skip_special_tokens=True)) for answer in answers]
        tokens = [len(answer.tokens) + answer.stopped for answer in answers]
        scores = self.rewards.score(texts, share, tokens=tokens)
        facts = [
            _facts(self.rewards.total(one), one, ended=answer.stopped, tokens=count)
            for one, answer, count in zip(scores, answers, tokens, strict=True)
        ]
        parts = [item for part in self.ranks.all_gather(facts) for item in part]
        level = Bootstrap(len(parts), samples=RESAMPLES, seed=1).level(mean_of([part["reward"] for part in parts]))
        return {f"eval/{name}": value for name, value in figures(parts).items()} | bounds("eval/reward", level)


def _add(sums: Any, *parts: Any) -> Any:
    """Adds the sums of some figures over tokens, and the number of tokens, shape (figures + 1,)."""
    size = torch.tensor(parts[0].numel())
    more = torch.stack([*(part.double().sum().cpu() for part in parts), size.double()])
    return more if sums is None else sums + more


def _facts(reward: float, scores: Mapping[str, float], *, ended: bool, tokens: int) -> dict[str, float]:
    """Returns the figures of one answer."""
    each = {f"reward_{name}": value for name, value in scores.items()}
    return {"reward": reward, **each, "cut": float(not ended), "answer_tokens": float(tokens)}


def figures(facts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each figure over answers."""
    names = facts[0] if facts else {}
    return {name: sum(fact[name] for fact in facts) / len(facts) for name in names}


def sampling_of(config: Any, *, batch_rows: int) -> Sampling:
    """Returns how the answers of a training are sampled."""
    return Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        batch_rows=batch_rows,
    )


def make_rewards(config: Any) -> Rewards:
    """Returns the rewards of ``train.grpo``."""
    return Rewards(
        weights=config.rewards,
        pattern=config.pattern,
        target_tokens=config.target_tokens,
        limit=config.max_new_tokens,
        stops=config.on_error == "stop",
        error_value=config.error_value,
    )


def answer_ends(job: Any) -> list[int]:
    """Returns the tokens that end an answer: those of tokenizer and model, and the template's end of turn.

    Raises:
        TrainError: There are none, so every answer would be cut.
    """
    file = job.data.folder / "rendering.json"
    turn = json.loads(file.read_text(encoding="utf-8")).get("end_of_turn_id") if file.is_file() else None
    ends = {*end_tokens(job.trainable.model, job.trainable.tokenizer), *([] if turn is None else [turn])}
    if not ends:
        raise TrainError(
            "train.objective=grpo: neither tokenizer, generation config nor chat template has a token that ends an "
            "answer; give a base with an end token, or data.template"
        )
    return sorted(ends)
