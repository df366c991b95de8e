"""The checks: each compares what a server gives with what the run measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.verify.endpoint import Endpoint, Refused, Reply
from finetune.verify.reference import Reference, Wanted

PASS, DIFFERS, UNASKED = "PASS", "DIFFERS", "CANNOT BE ASKED"

REPEATED_ROWS, REPEATS = 4, 2
"""Rows that are asked again, and how often: a choice. Sampled answers of a hundred tokens hardly ever repeat."""

STOP_SHARE = 0.2
"""Share of answers that may end elsewhere than the run's own, as answers that take another path do: a choice."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check.

    Attributes:
        name: Of the check.
        verdict: ``PASS``, ``DIFFERS`` or ``CANNOT BE ASKED``.
        detail: What was compared, and by how much it differs.
        figure: What was measured; None where the check has no figure.
        bound: What is allowed.
    """

    name: str
    verdict: str
    detail: str
    figure: float | None = None
    bound: float | None = None


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A held-out row that the server answered.

    Attributes:
        wanted: The row, with the run's own answer.
        reply: The server's.
        number: Of the row in the evaluation.
    """

    wanted: Wanted
    reply: Reply
    number: int

    @property
    def texts(self) -> tuple[str, str]:
        """The run's and the server's answer, without thoughts and surrounding space."""
        from finetune.inference.chat import without_thought

        own, served = (without_thought(text).strip() for text in (self.wanted.text, self.reply.text))
        return own, served


def ask(endpoint: Endpoint, wanted: Wanted, *, max_tokens: int) -> Reply:
    """Returns the answer to a held-out row: by the server's template, or past it where the row is not a chat.

    Raises:
        Refused: The server does not answer.
    """
    if wanted.chat is not None:
        return endpoint.chat(wanted.chat, max_tokens=max_tokens)
    return endpoint.complete(wanted.row["prompt_ids"], max_tokens=max_tokens)


def check_template(endpoint: Endpoint, reference: Reference, answered: Sequence[Answered]) -> Check:
    """Compares the prompts that the server makes of chats with those of training, as token ids or by their number."""
    name, exact, counted = "chat template", 0, 0
    chats = [item for item in answered if item.wanted.chat is not None]
    for number, (chat, wanted) in enumerate(zip(reference.chats, reference.chat_tokens, strict=True), 1):
        try:
            reply = endpoint.chat({"messages": chat}, max_tokens=1)
        except Refused as error:
            return Check(name=name, verdict=DIFFERS, detail=f"reference chat {number} is refused: {error}")
        ids = reply.prompt_ids or _tokens_of(endpoint, chat)
        problem = _difference(wanted, ids, reply.prompt_tokens)
        if problem:
            return Check(name=name, verdict=DIFFERS, detail=f"reference chat {number}: {problem}")
        exact, counted = exact + bool(ids), counted + (not ids and reply.prompt_tokens is not None)
    for item in chats:
        problem = _difference(item.wanted.row["prompt_ids"], item.reply.prompt_ids, item.reply.prompt_tokens)
        if problem:
            return Check(name=name, verdict=DIFFERS, detail=f"held-out row {item.number}: {problem}")
        exact, counted = (
            exact + bool(item.reply.prompt_ids),
            counted + (not item.reply.prompt_ids and item.reply.prompt_tokens is not None),
        )
    if not exact + counted:
        return Check(name=name, verdict=UNASKED, detail="the server gives neither token ids nor their number")
    parts = [f"{exact} chats have the token ids of training"] if exact else []
    parts += [f"{counted} have as many tokens as in training, without their ids"] if counted else []
    return Check(name=name, verdict=PASS, detail="; ".join(parts))


def check_context(endpoint: Endpoint, reference: Reference) -> Check:
    """Sends a chat as long as the longest row of the data, which a server with a short context cuts or refuses."""
    name = "context"
    if reference.longest is None:
        return Check(name=name, verdict=UNASKED, detail="the run's data have no chat that is longer than its template")
    messages, tokens = reference.longest
    try:
        reply = endpoint.chat({"messages": messages}, max_tokens=1)
    except Refused as error:
        return Check(
            name=name, verdict=DIFFERS, detail=f"a chat of {tokens} tokens, as the data have, is refused: {error}"
        )
    if reply.prompt_tokens is None:
        return Check(name=name, verdict=UNASKED, detail="the server does not say how many tokens it read")
    if reply.prompt_tokens != tokens:
        return Check(
            name=name,
            verdict=DIFFERS,
            detail=f"of a chat of {tokens} tokens, as the data have, the server read {reply.prompt_tokens}",
            figure=reply.prompt_tokens,
            bound=tokens,
        )
    return Check(name=name, verdict=PASS, detail=f"a chat of {tokens} tokens, as the data have, is read whole")


def check_answers(answered: Sequence[Answered], *, bound: float) -> Check:
    """Compares greedy answers with the run's own: how much of each is the same before the first difference."""
    name = "answers"
    if not answered:
        return Check(name=name, verdict=UNASKED, detail="no held-out row was answered")
    pairs = [item.texts for item in answered]
    equal = sum(own == served for own, served in pairs)
    agreement = sum(_agreement(own, served) for own, served in pairs) / len(pairs)
    detail = (
        f"{equal} of {len(pairs)} greedy answers are the run's own; they agree over {agreement:.0%} of their length"
    )
    if agreement < bound:
        first = next(item for item in answered if item.texts[0] != item.texts[1])
        own, served = first.texts
        detail += f" (bound {bound:.0%}); row {first.number}: {served[:60]!r} for {own[:60]!r}"
    return Check(
        name=name, verdict=PASS if agreement >= bound else DIFFERS, detail=detail, figure=agreement, bound=bound
    )


def check_end(answered: Sequence[Answered]) -> Check:
    """Compares where answers end: the server must stop where the run did, with ``finish_reason`` stop."""
    name = "end of turn"
    known = [item for item in answered if item.wanted.stopped is not None]
    ended = [item for item in known if item.wanted.stopped]
    if not ended:
        return Check(
            name=name, verdict=UNASKED, detail=f"none of the run's {len(known)} answers ended within its limit"
        )
    beyond = [item for item in ended if item.texts[1].startswith(item.texts[0]) and item.reply.finish != "stop"]
    early = [
        item
        for item in known
        if item.reply.finish == "stop" and item.texts[1] != item.texts[0] and item.texts[0].startswith(item.texts[1])
    ]
    own = len(ended) / len(known)
    served = sum(item.reply.finish == "stop" for item in known) / len(known)
    detail = f"{served:.0%} of {len(known)} answers end by themselves, {own:.0%} of the run's own"
    if beyond:
        detail += f"; {len(beyond)} continue after the run's end (finish_reason {beyond[0].reply.finish})"
    if early:
        detail += f"; {len(early)} end before the run's end"
    too_many = len(beyond) + len(early) > STOP_SHARE * len(known) or abs(own - served) > STOP_SHARE
    return Check(name=name, verdict=DIFFERS if too_many else PASS, detail=detail, figure=served, bound=own)


def check_repeat(endpoint: Endpoint, answered: Sequence[Answered], *, max_tokens: int) -> Check:
    """Asks the same again: with temperature 0 the answer must be the same."""
    name = "greedy"
    chosen = sorted(answered, key=lambda item: -len(item.wanted.text))[:REPEATED_ROWS]
    if not chosen:
        return Check(name=name, verdict=UNASKED, detail="no held-out row was answered")
    try:
        changed = [
            item
            for item in chosen
            if any(ask(endpoint, item.wanted, max_tokens=max_tokens).text != item.reply.text for _ in range(REPEATS))
        ]
    except Refused as error:
        return Check(name=name, verdict=DIFFERS, detail=f"a request that was answered before is refused: {error}")
    asked = f"{len(chosen)} rows asked {REPEATS + 1} times with temperature 0"
    if changed:
        return Check(
            name=name, verdict=DIFFERS, detail=f"{asked}: {len(changed)} got other answers; the server samples",
            figure=len(changed), bound=0,
        )  # fmt: skip
    return Check(name=name, verdict=PASS, detail=f"{asked} got the same answers")


def _tokens_of(endpoint: Endpoint, chat: list[dict[str, str]]) -> list[int] | None:
    try:
        return endpoint.chat_tokens(chat)
    except (Refused, KeyError, TypeError, ValueError):
        return None


def _difference(wanted: Sequence[int], ids: Sequence[int] | None, count: int | None) -> str:
    """Returns how a prompt differs from the one of training; empty where it does not, as far as is known."""
    wanted = list(wanted)
    if ids is not None and list(ids) != wanted:
        place = next(
            (place for place, (mine, theirs) in enumerate(zip(wanted, ids, strict=False)) if mine != theirs),
            min(len(wanted), len(ids)),
        )
        doubled = wanted and list(ids) == [wanted[0], *wanted]
        why = "; its first token is doubled" if doubled else ""
        return (
            f"{len(ids)} tokens for {len(wanted)} of training, different from position {place}: "
            f"{list(ids[place : place + 4])} for {wanted[place : place + 4]}{why}"
        )
    if count is not None and count != len(wanted):
        return f"the server read {count} tokens, and training has {len(wanted)}"
    return ""


def _agreement(own: str, served: str) -> float:
    """Returns how much of the longer text both begin with."""
    longest = max(len(own), len(served))
    pairs = zip(own, served, strict=False)
    same = next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(own), len(served)))
    return same / longest if longest else 1.0
