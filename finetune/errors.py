"""What can go wrong, by who can mend it. Every message says where, the rule, the value and the remedy."""


class FinetuneError(Exception):
    """The user can mend it: one clear message, exit code 2, no traceback."""


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
    """This machine cannot do what was asked; the message names the alternative."""


class ModelError(FinetuneError):
    """The base model or its tokenizer cannot be loaded or adapted as asked."""


class TrainError(FinetuneError):
    """Training cannot start, or cannot go on."""


class EvalError(FinetuneError):
    """An artifact cannot be scored, or a gate was not met."""


class MergeError(FinetuneError):
    """No merge candidate is good enough to ship."""


class ExportError(FinetuneError):
    """An export is missing a tool, or differs from the model it was made from."""


class Interrupted(Exception):
    """A signal stopped the run after everything was saved: exit code 75, and the run can go on later."""


class GateMissed(Exception):
    """The run is complete and not good enough by ``eval.gate``: exit code 1."""


class RankFailed(Exception):
    """Another process of this launch ended first, and this one ends with its message.

    Attributes:
        code: Its exit code.
    """

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.code = code
