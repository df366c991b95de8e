"""Decides which rows are decoded together, and decodes them one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from finetune.console import log
from finetune.serve.batch import Batch, Row
from finetune.serve.engine import Finish, Load, Token
from finetune.serve.graphs import Graphs
from finetune.serve.sampling import choose, log_probabilities

PREFILL_TOKENS = 2048
"""Padded prompt tokens of one forward pass: bounds its activations, and how long running answers wait for it. A single
longer prompt is read alone."""


class Scheduler:
    """Batches continuously: between two tokens, new rows join and those that ended leave. Not for several threads.

    Rows start in the order in which they came. A row starts only when it fits with its longest possible answer, so no
    row is ever put back. Models have a batch each and take turns.

    Args:
        graphs: The models.
        ends: Tokens that end an answer.
        concurrent: Rows of all batches together.
        cache_tokens: Padded tokens that the key-value caches may grow to.
    """

    def __init__(self, graphs: Graphs, *, ends: Sequence[int], concurrent: int, cache_tokens: int) -> None:
        self._graphs, self._ends = graphs, frozenset(ends)
        self._concurrent, self._cache_tokens = concurrent, cache_tokens
        self._waiting: list[Row] = []
        self._batches: dict[str, Batch] = {}

    def add(self, row: Row) -> None:
        """Queues a row."""
        if row.generation.model in self._graphs.names():
            self._waiting.append(row)
        else:
            finish(row, "error", error=f"the model {row.generation.model} was unloaded")

    def is_idle(self) -> bool:
        """Returns whether there is nothing to generate."""
        return not (self._waiting or self._batches)

    def load(self) -> Load:
        """Returns how many rows there are, and the bytes of their caches."""
        batches = list(self._batches.values())
        running, cache_bytes = sum(len(batch.rows) for batch in batches), sum(batch.cache_bytes() for batch in batches)
        return Load(running=running, waiting=len(self._waiting), cache_bytes=cache_bytes)

    def end(self, error: str, *, model: str | None = None) -> None:
        """Ends the rows of a model, or of all."""
        for name in [*self._batches]:
            if model in (None, name):
                for row in self._batches.pop(name).rows:
                    finish(row, "error", error=error)
        waiting, self._waiting = self._waiting, []
        for row in waiting:
            if model in (None, row.generation.model):
                finish(row, "error", error=error)
            else:
                self._waiting.append(row)

    def round(self) -> None:
        """Starts the rows that fit, and generates one token of every row."""
        self._drop_cancelled()
        for name, rows in self._admit().items():
            self._guarded(name, rows, self._prefill)
        for name, batch in list(self._batches.items()):
            self._guarded(name, batch.rows, self._step)

    def _guarded(self, name: str, rows: Sequence[Row], work: Callable[[str, Sequence[Row]], None]) -> None:
        """Runs one forward pass. Where torch fails, e.g. out of memory, its rows end and the others continue."""
        try:
            work(name, rows)
        except RuntimeError as error:
            log("serve", f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            batch = self._batches.pop(name, None)
            for row in {*rows, *(batch.rows if batch else [])}:
                finish(row, "error", error="the model failed to compute this answer")

    def _drop_cancelled(self) -> None:
        cancelled = [row for row in self._waiting if row.generation.cancelled]
        self._waiting = [row for row in self._waiting if not row.generation.cancelled]
        for name, batch in list(self._batches.items()):
            dropped = [row for row in batch.rows if row.generation.cancelled or row.error]
            self._keep(name, [row for row in batch.rows if row not in dropped])
            cancelled += dropped
        for row in cancelled:
            finish(row, "error" if row.error else "cancelled", error=row.error)

    def _admit(self) -> dict[str, list[Row]]:
        """Takes the first waiting rows that fit, in their order, by model."""
        running = {name: list(batch.rows) for name, batch in self._batches.items()}
        admitted: dict[str, list[Row]] = {}
        while self._waiting:
            row = self._waiting[0]
            name = row.generation.model
            running.setdefault(name, []).append(row)
            starting = [*admitted.get(name, []), row]
            if (
                _padded(len(other.generation.prompt) for other in starting) > PREFILL_TOKENS and len(starting) > 1
            ) or not self._fits(running):
                break
            admitted[name] = starting
            self._waiting.pop(0)
        return admitted

    def _fits(self, running: Mapping[str, Sequence[Row]]) -> bool:
        count = sum(map(len, running.values()))
        tokens = sum(_padded(row.generation.most_tokens for row in rows) for rows in running.values())
        return count <= self._concurrent and tokens <= self._cache_tokens

    def _prefill(self, name: str, rows: Sequence[Row]) -> None:
        batch, logits = Batch.prefill(self._graphs.activate(name), rows)
        self._take(rows, logits)
        if name in self._batches:
            self._batches[name].join(batch)
        else:
            self._batches[name] = batch
        self._drop_ended(name)

    def _step(self, name: str, rows: Sequence[Row]) -> None:
        self._graphs.activate(name)
        self._take(rows, self._batches[name].step())
        self._drop_ended(name)

    def _take(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Chooses each row's next token and sends it."""
        best = logits.argmax(-1).tolist()
        for index, row in enumerate(rows):
            sampling = row.generation.sampling
            if row.json_answer is not None:
                row.last = choose(row.json_answer.mask(logits[index]), sampling, row.generator)
                row.error = row.json_answer.add(row.last)
            else:
                is_greedy = sampling.temperature == 0
                row.last = best[index] if is_greedy else choose(logits[index], sampling, row.generator)
            row.count += 1
            if row.last in self._ends:
                continue
            text = row.decoder.add(row.last)
            if sampling.top_logprobs is None:
                row.generation.on_event(Token(row.last, text))
            else:
                row.generation.on_event(
                    Token(row.last, text, *log_probabilities(logits[index], row.last, sampling.top_logprobs))
                )

    def _drop_ended(self, name: str) -> None:
        rows = [row for row in self._batches[name].rows if not row.error]
        stopped = [row for row in rows if row.last in self._ends]
        full = [row for row in rows if row not in stopped and row.count >= row.generation.sampling.max_tokens]
        self._keep(name, [row for row in self._batches[name].rows if row not in stopped and row not in full])
        for row in stopped:
            finish(row, "stop")
        for row in full:
            finish(row, "length")

    def _keep(self, name: str, rows: list[Row]) -> None:
        if not rows:
            del self._batches[name]
        elif len(rows) < len(self._batches[name].rows):
            self._batches[name].keep(rows)


def finish(row: Row, reason: str, *, error: str = "") -> None:
    """Sends the end of a row."""
    row.generation.on_event(Finish(reason, row.count, text=row.decoder.flush(), error=error))


def _padded(lengths: Iterable[int]) -> int:
    """Returns the size of a batch of rows that are padded to the longest."""
    sizes = list(lengths)
    return len(sizes) * max(sizes)
