"""Serves models in transformers: one thread decodes all answers together, each with its own sampling."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import pairwise
from typing import TypeVar

import torch

from finetune.inference.chat import Chat
from finetune.inference.generation import contiguous_head_input
from finetune.inference.logits import trained_logits
from finetune.serve.batch import Row, check_padding
from finetune.serve.chat_template import ChatTokens
from finetune.serve.engine import Finish, Generation, Load, Token
from finetune.serve.graphs import Graphs, ServedModel
from finetune.serve.json_object import open_grammar
from finetune.serve.sampling import log_probabilities
from finetune.serve.scheduler import Scheduler

Result = TypeVar("Result")


class TransformersEngine(ChatTokens):
    """Answers by one or more models that share a tokenizer, e.g. adapters of one base.

    Args:
        chat: Tokenizer, end tokens and system message of the training.
        models: Graphs on one device.
        concurrent: Rows that are decoded at the same time, of all models together.
        cache_bytes: Bound of the key-value caches.

    Raises:
        ModelError: A model gives other logits for a padded row.
    """

    def __init__(self, chat: Chat, models: Sequence[ServedModel], *, concurrent: int, cache_bytes: int) -> None:
        self.graphs, self._hooks = Graphs(models), ExitStack()
        causal = self.graphs.causal()
        super().__init__(chat, causal[0])
        self._tokenizer = copy.deepcopy(chat.tokenizer)  # a fast tokenizer must not encode and decode in two threads
        self._json = open_grammar(self._tokenizer, chat.ends)
        self.supports_json = self._json is not None
        configs = [model.config.get_text_config() for model in causal]
        for model in causal:
            self._hooks.enter_context(contiguous_head_input(model))
        with torch.no_grad():
            token_bytes = max(check_padding(model, self._tokenizer, rows=concurrent) for model in causal)
        cache_tokens = cache_bytes // token_bytes
        self.context_tokens = min(*(config.max_position_embeddings for config in configs), cache_tokens)
        self.vocabulary = min(config.vocab_size for config in configs)
        self._scheduler = Scheduler(self.graphs, ends=chat.ends, concurrent=concurrent, cache_tokens=cache_tokens)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    def names(self) -> list[str]:
        """Returns the models that can be asked now."""
        return self.graphs.names()

    def start(self, generation: Generation) -> None:
        """Queues an answer."""
        if not self.is_alive():
            generation.on_event(Finish("error", 0, error="the engine has ended; restart the server"))
        self._commands.put(lambda: self._scheduler.add(self._row(generation)))

    def score(self, model: str, tokens: Sequence[int], *, top: int) -> list[Token]:
        """Returns each token of a text with its log-probability, from a forward pass over the whole text."""
        return self.call(lambda: self._score(model, tokens, top))

    def call(self, function: Callable[[], Result]) -> Result:
        """Runs a function in the engine's thread, between two tokens, and returns its result.

        Raises:
            RuntimeError: The engine has ended.
        """
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - raised again by the thread that waits for the result
                future.set_exception(error)

        self._commands.put(run)
        while self._thread.is_alive() or future.done():
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                continue
        raise RuntimeError("the engine has ended")

    def remove(self, name: str) -> None:
        """Ends the answers of a model and forgets it; runs in the engine's thread, see `call`."""
        self._scheduler.end(f"the model {name} was unloaded", model=name)
        self.graphs.remove(name)

    def load(self) -> Load:
        """Returns how busy the engine is."""
        return self._scheduler.load()

    def is_alive(self) -> bool:
        """Returns whether the engine's thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Ends every answer and the thread."""
        self._commands.put(None)
        self._thread.join()
        self._hooks.close()

    def _row(self, generation: Generation) -> Row:
        answer = self._json.start() if self._json is not None and generation.sampling.json_object else None
        return Row(generation, self._tokenizer, json_answer=answer)

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._take_commands():
                    self._scheduler.round()
        finally:
            self._scheduler.end("the server has ended")

    def _take_commands(self) -> bool:
        """Runs what was queued; waits for it where there is nothing to generate. False: the engine shall end."""
        while True:
            try:
                command = self._commands.get(block=self._scheduler.is_idle())
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _score(self, model: str, tokens: Sequence[int], top: int) -> list[Token]:
        row = {"input_ids": list(tokens), "labels": list(tokens)}
        scores = [
            log_probabilities(logits, target, top)
            for chunk in trained_logits(self.graphs.activate(model), [row], batch_tokens=len(tokens))
            for logits, target in zip(chunk.logits.cpu(), chunk.targets.tolist(), strict=True)
        ]
        scored = zip(pairwise(tokens), scores, strict=True)
        first = Token(tokens[0], self._tokenizer.decode([tokens[0]]))
        return [first, *(Token(token, self._tokenizer.decode([token]), *score) for (_, token), score in scored)]
