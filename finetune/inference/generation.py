"""Generates greedy answers in batches of similar prompt length."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from finetune.console import ProgressBar
from finetune.inference.budget import answer_batches, usable
from finetune.inference.dense import cost_of, free_on
from finetune.inference.logits import evaluating, input_device, unwrap
from finetune.inference.oom import in_halves
from finetune.inference.prefill import shared_prefill


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model generated after a prompt.

    Attributes:
        tokens: New token ids, without the end token.
        stopped: Whether the model ended it; False where it reached the limit.
    """

    tokens: list[int]
    stopped: bool


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_rows: int | None,
    ends: Sequence[int] | None = None,
    progress: str | None = None,
) -> list[Answer]:
    """Returns greedy answers in the order of the prompts.

    Args:
        model: A causal language model, with or without a peft adapter.
        tokenizer: Gives the padding and end tokens.
        prompts: Token ids up to and including the generation prompt.
        max_new_tokens: Limit of an answer's length, the end token included.
        batch_rows: Prompts per batch; None computes it from the free memory. Answers do not depend on it, except where
            two tokens are nearly tied: logits differ by rounding (1e-5 in float32) between batch sizes.
        ends: Tokens that end an answer; None uses those of tokenizer and model.
        progress: Title of the progress bar; None for none.
    """
    stream = stream_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_rows=batch_rows,
        ends=ends,
        progress=progress,
    )
    answers = dict(stream)
    return [answers[index] for index in range(len(prompts))]


def stream_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_rows: int | None,
    ends: Sequence[int] | None = None,
    progress: str | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Yields (index of the prompt, answer) as batches finish, so that a caller can save them one by one."""
    stops = sorted(ends) if ends is not None else end_tokens(model, tokenizer)
    pad = _pad_token(tokenizer, stops)
    batches = _batches(model, [len(prompt) for prompt in prompts], limit=max_new_tokens, batch_rows=batch_rows)

    def answer(batch: list[int]) -> list[tuple[int, Answer]]:
        chosen = [prompts[index] for index in batch]
        return list(zip(batch, _batch(unwrap(model), chosen, ends=stops, pad=pad, limit=max_new_tokens), strict=True))

    with (
        evaluating(model),
        contiguous_head_input(unwrap(model)),
        ProgressBar(progress or "", total=len(prompts), unit="rows", is_shown=progress is not None) as bar,
    ):
        for answers in in_halves(batches, answer):
            yield from answers
            bar.advance(len(answers))


def _batches(model: Any, lengths: list[int], *, limit: int, batch_rows: int | None) -> Iterator[list[int]]:
    """Groups the prompts by length, in batches that the free memory suffices for."""
    if batch_rows:
        return answer_batches(lengths, lambda _: batch_rows)
    causal = unwrap(model)
    cost, free = cost_of(causal.config, dtype=causal.dtype), usable(min(free_on(input_device(model).type).devices))
    return answer_batches(lengths, lambda longest: cost.answer_rows(free, prompt_tokens=longest, new_tokens=limit))


def contiguous_head_input(causal: Any) -> AbstractContextManager[Any]:
    """Makes the input of a model's head contiguous, until the returned context ends.

    transformers passes each row's last position as a strided slice, and torch 2.13 multiplies such a slice on a CPU by
    one copy of the weights per row: 1.7 GB and seconds for 32 rows of a vocabulary of 49,152 by 576."""
    head = causal.get_output_embeddings()
    if head is None:
        return nullcontext()
    hook: AbstractContextManager[Any] = head.register_forward_pre_hook(
        lambda _, inputs: (inputs[0].contiguous(), *inputs[1:])
    )
    return hook


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Returns the tokens that end an answer: the tokenizer's and those of the model's generation config, sorted."""
    ends = {tokenizer.eos_token_id}
    configured = getattr(getattr(unwrap(model), "generation_config", None), "eos_token_id", None)
    ends.update(configured if isinstance(configured, list) else [configured])
    return sorted(end for end in ends if end is not None)


def _pad_token(tokenizer: Any, ends: list[int]) -> int:
    """Returns the id for padding. It is masked, so any id works; the tokenizer's own keeps logs readable."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return ends[0] if ends else 0


def _batch(model: Any, prompts: Sequence[Sequence[int]], *, ends: list[int], pad: int, limit: int) -> list[Answer]:
    return [_answer(row, ends) for row in generate_tokens(model, prompts, ends=ends, pad=pad, limit=limit)]


def generate_tokens(
    model: Any, prompts: Sequence[Sequence[int]], *, ends: list[int], pad: int, limit: int, choice: Any = None
) -> list[list[int]]:
    """Returns the new tokens of one batch, greedy, or chosen by a logits processor that leaves one token.

    With a processor, as for a group of sampled answers, equal prompts are read once.

    Args:
        model: Without a peft wrapper.
        prompts: Padded on the left.
        ends: Tokens that end an answer; ``pad`` follows them.
        pad: Token id for padding.
        limit: Longest answer.
        choice: A `transformers.LogitsProcessor`; None for greedy answers.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    device = input_device(model)
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for index, prompt in enumerate(prompts):
        ids[index, longest - len(prompt) :] = torch.tensor(prompt)
        mask[index, longest - len(prompt) :] = 1
    # Every neutral value is explicit: transformers takes unset ones from the model's own generation_config, and a
    # penalty that some bases have there would make decoding other than greedy.
    greedy = GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,
    )
    ids, mask = ids.to(device), mask.to(device)
    sequences = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=shared_prefill(model, ids, mask) if choice else None,
        generation_config=greedy,
        logits_processor=LogitsProcessorList([choice] if choice else []),
    )
    new_tokens: list[list[int]] = sequences[:, longest:].tolist()
    return new_tokens


def _answer(tokens: list[int], ends: list[int]) -> Answer:
    for position, token in enumerate(tokens):
        if token in ends:
            return Answer(tokens=tokens[:position], stopped=True)
    return Answer(tokens=tokens, stopped=False)
