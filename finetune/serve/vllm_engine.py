"""Answers by vLLM: prompts are rendered here and sent as token ids, and its tokens are decoded here."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finetune.errors import ModelError
from finetune.inference.chat import Chat
from finetune.serve.chat_template import ChatTokens
from finetune.serve.engine import Event, Finish, Generation, Load, RequestRefused, Sampling, Token
from finetune.serve.text import TextDecoder
from finetune.serve.upstream import UpstreamError, deliver
from finetune.serve.vllm_process import VllmProcess


class VllmEngine(ChatTokens):
    """One set of weights in vLLM, with or without adapters.

    Args:
        chat: Tokenizer, end tokens and system message of the training.
        process: The running vLLM.
        names: Of its models, those that can be asked.
        settings: Of the weights, as transformers reads their config.json.
    """

    supports_json = True

    def __init__(self, chat: Chat, process: VllmProcess, *, names: Sequence[str], settings: Any) -> None:
        super().__init__(chat, SimpleNamespace(config=settings))
        self._process, self._names = process, list(names)
        self._tokenizer = copy.deepcopy(chat.tokenizer)  # a fast tokenizer must not encode and decode in two threads
        self._decoding = threading.Lock()
        self._running: set[Generation] = set()
        served = process.server.ask("/v1/models")["data"]
        self.context_tokens = min(int(entry["max_model_len"]) for entry in served if entry.get("max_model_len"))
        self.vocabulary = int(settings.get_text_config().vocab_size)

    def names(self) -> list[str]:
        """Returns the models that can be asked now."""
        return list(self._names)

    def start(self, generation: Generation) -> None:
        """Starts an answer, in a thread that reads vLLM's stream."""
        self._running.add(generation)
        threading.Thread(target=self._generate, args=[generation], name="vllm", daemon=True).start()

    def score(self, model: str, tokens: Sequence[int], *, top: int) -> list[Token]:
        """Returns each token of a text with its log-probability after the ones before it; the first has None.

        Raises:
            RequestRefused: vLLM refuses, e.g. a text that fills its whole context.
        """
        body = {"model": model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
        try:
            places = self._process.server.ask("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        except UpstreamError as error:
            raise RequestRefused(f"vLLM does not score this prompt: {error}", parameter="prompt") from error
        scored = [Token(tokens[0], self.token_text(tokens[0]))]
        for token, place in zip(tokens[1:], places[1:], strict=True):
            scores = {int(other): float(score["logprob"]) for other, score in place.items()}
            scored.append(Token(token, self.token_text(token), scores[token], _best(scores, top)))
        return scored

    def load(self) -> Load:
        """Returns how many answers are open; vLLM's own queue and cache are in its process."""
        return Load(running=len(self._running), waiting=0, cache_bytes=0)

    def is_alive(self) -> bool:
        """Returns whether vLLM runs and takes requests."""
        return self._process.is_alive()

    def close(self) -> None:
        """Ends every answer and vLLM."""
        for generation in list(self._running):
            generation.cancel()
        self._process.close()

    def add_adapter(self, name: str, folder: Path) -> None:
        """Loads another adapter of the base.

        Raises:
            ModelError: vLLM refuses it.
        """
        try:
            self._process.server.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except UpstreamError as error:
            raise ModelError(f"vLLM cannot load {folder}: {error}") from error
        self._names.append(name)

    def drop_adapter(self, name: str) -> None:
        """Ends an adapter's answers and drops it."""
        self._names.remove(name)
        for generation in [running for running in self._running if running.model == name]:
            generation.cancel()
        self._process.server.ask("/v1/unload_lora_adapter", {"lora_name": name})

    def _generate(self, generation: Generation) -> None:
        deliver(self._events(generation), generation, running=self._running, program="vLLM")

    def _events(self, generation: Generation) -> Iterator[Event]:
        """Yields tokens as they come, and how the answer ended. The end token is counted only."""
        decoder, count, ends = TextDecoder(self._tokenizer), 0, frozenset(self._chat.ends)
        body = _body(generation, self._chat.ends)
        for event in self._process.server.stream("/v1/completions", body, generation):
            if "error" in event:
                raise ValueError(event["error"])
            if not event["choices"]:
                continue
            choice = event["choices"][0]
            tokens = choice["token_ids"] or []
            count += len(tokens)
            for token, logprob, top in zip(tokens, *_scores(choice, len(tokens), generation.sampling), strict=True):
                if token in ends:
                    continue
                with self._decoding:
                    text = decoder.add(token)
                yield Token(token, text, logprob, top)
            if choice["finish_reason"] not in (None, "stop", "length"):
                raise ValueError(f"it ended the answer with {choice['finish_reason']}")
            if choice["finish_reason"]:
                with self._decoding:
                    rest = decoder.flush()
                yield Finish(choice["finish_reason"], count, text=rest)
                return


def _body(generation: Generation, ends: Sequence[int]) -> dict[str, Any]:
    sampling = generation.sampling
    body: dict[str, Any] = {
        "model": generation.model,
        "prompt": generation.prompt,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed,
        "stop_token_ids": list(ends),
        "stream": True,
        "return_token_ids": True,
    }
    if sampling.top_logprobs is not None:
        body |= {"logprobs": sampling.top_logprobs, "return_tokens_as_token_ids": True}
    return body | {"response_format": {"type": "json_object"}} if sampling.json_object else body


def _scores(
    choice: Mapping[str, Any], count: int, sampling: Sampling
) -> tuple[list[float | None], list[tuple[tuple[int, float], ...]]]:
    """Returns each token's log-probability and alternatives; none where they were not asked for."""
    if sampling.top_logprobs is None or not count:
        return [None] * count, [()] * count
    logprobs = choice["logprobs"]
    tops = [_by_token(place or {}) for place in logprobs["top_logprobs"]]
    return logprobs["token_logprobs"], [_best(scores, sampling.top_logprobs) for scores in tops]


def _by_token(place: Mapping[str, float]) -> dict[int, float]:
    return {int(name.removeprefix("token_id:")): score for name, score in place.items()}


def _best(scores: Mapping[int, float], top: int) -> tuple[tuple[int, float], ...]:
    """Returns the most probable tokens; vLLM lists the chosen one too, and first."""
    return tuple(sorted(scores.items(), key=lambda item: -item[1])[:top])
