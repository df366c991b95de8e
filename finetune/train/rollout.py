"""The answers of one step: sampled, scored, compared within their group, and made into micro-batches."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.inference.collate import Collator
from finetune.inference.rows import IGNORED
from finetune.inference.sampling import Sample, Sampling, sample, seed_of
from finetune.rewards import Rewards
from finetune.train.policy_loss import advantages

if TYPE_CHECKING:
    from finetune.launch.ranks import Ranks

NUMBER = "number_in_group"
"""Column of a prompt row: which of its group's answers is sampled for it."""


@dataclass(slots=True)
class Completion:
    """An answer that the model sampled.

    Attributes:
        row: Ledger number of its prompt.
        number: Which answer of its group it is.
        prompt: Token ids.
        sample: What was sampled.
        text: Without special tokens.
        scores: Each reward, before its weight.
        reward: Their weighted sum.
        advantage: Of the reward, within the group.
    """

    row: int
    number: int
    prompt: list[int]
    sample: Sample
    text: str
    scores: dict[str, float] = field(default_factory=dict)
    reward: float = 0.0
    advantage: float = 0.0

    def document(self) -> dict[str, Any]:
        """Returns prompt and answer as a row that trains on the answer."""
        ids = self.prompt + self.sample.tokens
        return {
            "input_ids": ids,
            "labels": [IGNORED] * len(self.prompt) + self.sample.tokens,
            "seq_lengths": [len(ids)],
        }


@dataclass(slots=True)
class Rollout:
    """The answers of one process in one step.

    Attributes:
        completions: In the order of the rows.
        dead: Groups whose rewards are all equal, over all processes.
        groups: All groups.
        sampling_seconds: Of sampling.
        reward_seconds: Of the rewards.
    """

    completions: list[Completion]
    dead: int = 0
    groups: int = 0
    sampling_seconds: float = 0.0
    reward_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PromptCollator:
    """Keeps the rows as they are: their answers do not exist yet.

    Attributes:
        flat: Of the micro-batches of answers; see `collate`.
        pad_token_id: Likewise.
    """

    flat: bool
    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns the rows as ``prompts``."""
        return {"prompts": list(rows)}

    def answers(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Collates sampled answers.

        Returns:
            The keys of `Collator`; ``answer_tokens`` and ``advantages``, shape (answers,); ``sampled``: the sampler's
            log-probabilities, shape (tokens,); ``rows``: ledger numbers.
        """
        batch = Collator(flat=self.flat, pad_token_id=self.pad_token_id)([item.document() for item in completions])
        return {
            **batch,
            "answer_tokens": torch.tensor([len(item.sample.tokens) for item in completions]),
            "advantages": torch.tensor([item.advantage for item in completions]),
            "sampled": torch.tensor([value for item in completions for value in item.sample.logprobs]),
            "rows": [item.row for item in completions],
        }


def roll_out(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    sampling: Sampling,
    seeds: Sequence[int],
    ends: list[int],
) -> list[Completion]:
    """Samples an answer to each row's prompt.

    Args:
        model: The adapted model.
        tokenizer: Decodes the answers.
        rows: ``prompt_ids``, ``row``, and the number within the group.
        sampling: Limits and distribution.
        seeds: Of each answer, see `answer_seeds`.
        ends: Tokens that end an answer.
    """
    prompts = [row["prompt_ids"] for row in rows]
    samples = sample(model, prompts, seeds, sampling=sampling, ends=ends)
    return [
        Completion(
            row=row["row"],
            number=row.get(NUMBER, 0),
            prompt=list(row["prompt_ids"]),
            sample=drawn,
            text=tokenizer.decode(drawn.tokens[:-1] if drawn.ended else drawn.tokens, skip_special_tokens=True),
        )
        for row, drawn in zip(rows, samples, strict=True)
    ]


def answer_seeds(rows: Sequence[dict[str, Any]], *, seed: int, step: int) -> list[int]:
    """Returns the seed of each row's answer: of the run, the step, the row, and the number within the group."""
    return [seed_of(seed, step, row["row"], row.get(NUMBER, 0)) for row in rows]


def score(completions: Sequence[Completion], rows: Sequence[dict[str, Any]], rewards: Rewards) -> None:
    """Computes rewards, and writes them into the completions."""
    texts, tokens = [item.text for item in completions], [len(item.sample.tokens) for item in completions]
    for item, scores in zip(completions, rewards.score(texts, rows, tokens=tokens), strict=True):
        item.scores, item.reward = scores, rewards.total(scores)


def compare(completions: Sequence[Completion], *, loss: str, ranks: Ranks) -> tuple[int, int]:
    """Writes the advantages into the completions; a group may lie in several processes.

    Returns:
        The groups whose rewards are all equal, and all groups.
    """
    groups: defaultdict[int, dict[int, float]] = defaultdict(dict)
    for part in ranks.all_gather([(item.row, item.number, item.reward) for item in completions]):
        for row, number, reward in part:
            groups[row][number] = reward
    dead = {row for row, group in groups.items() if len(set(group.values())) == 1}
    found = {}
    for row, group in groups.items():
        rewards = torch.tensor([list(group.values())]).double()
        values = [0.0] * len(group) if row in dead else advantages(rewards, loss=loss)[0].tolist()
        found[row] = dict(zip(group, values, strict=True))
    for item in completions:
        item.advantage = found[item.row][item.number]
    return len(dead), len(groups)


def run_step(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    rewards: Rewards,
    sampling: Sampling,
    seeds: Sequence[int],
    ends: list[int],
) -> Rollout:
    """Samples and scores the answers of a step; `compare` completes them."""
    started = time.monotonic()
    completions = roll_out(model, tokenizer, rows, sampling=sampling, seeds=seeds, ends=ends)
    sampled = time.monotonic()
    score(completions, rows, rewards)
    return Rollout(completions, sampling_seconds=sampled - started, reward_seconds=time.monotonic() - sampled)


def write_samples(file: Path | None, step: int, completions: Sequence[Completion], *, ranks: Ranks) -> None:
    """Appends the answers of a step over all processes, one line of JSON each; only the main process has a file."""
    lines = [
        {
            "step": step,
            "row": item.row,
            "number": item.number,
            "answer": item.text,
            "tokens": len(item.sample.tokens),
            "ended": item.sample.ended,
            "scores": item.scores,
            "reward": item.reward,
            "advantage": item.advantage,
        }
        for item in completions
    ]
    gathered = [line for part in ranks.all_gather(lines) for line in part]
    if file is None:
        return
    with open(file, "a", encoding="utf-8") as handle:
        for line in sorted(gathered, key=lambda line: (line["row"], line["number"])):
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
