"""Errors, each class with its exit code. Every message says where, the rule, the value and the remedy."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILURE = 1
"""Our fault or the machine's, or a result that is not good enough."""

EXIT_USAGE = 2
"""The user can fix it."""

EXIT_INTERRUPTED = 75
"""A signal stopped the run after everything was saved; it can be resumed. Source: EX_TEMPFAIL of sysexits.h."""


class FinetuneError(Exception):
    """An error that the user can fix: printed as one message, without a traceback.

    Attributes:
        exit_code: What the program ends with.
    """

    exit_code = EXIT_USAGE


class ConfigError(FinetuneError):
    """The configuration breaks a rule. Lists every problem at once.

    Args:
        problems: One sentence each: where, rule, value, remedy.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in the configuration:\n{lines}")


class DataError(FinetuneError):
    """A data file or row cannot be used."""


class HardwareError(FinetuneError):
    """This machine cannot do what was asked for; the message names the alternative."""


class ModelError(FinetuneError):
    """The base model or its tokenizer cannot be loaded or adapted as asked for."""


class DamagedProduct(FinetuneError):
    """A file of a finished stage changed, so nothing can be built upon it."""


class TrainError(FinetuneError):
    """Training cannot start or cannot continue."""


class EvalError(FinetuneError):
    """A model or an export cannot be scored."""


class MergeError(FinetuneError):
    """No merge candidate is good enough to ship."""


class ExportError(FinetuneError):
    """An export is missing a tool, or differs from the model that it was made from."""


class Interrupted(FinetuneError):
    """A signal stopped the run after everything was saved; it can be resumed."""

    exit_code = EXIT_INTERRUPTED


class GateMissed(FinetuneError):
    """The run is complete, and a score misses its threshold in ``eval.gate``."""

    exit_code = EXIT_FAILURE


class RankFailed(FinetuneError):
    """Another process of this launch failed first; this one ends with that message and exit code."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
