"""How much went through training, kept across interruptions."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """Tokens that went through training.

    Attributes:
        tokens: Read, padding left out.
        trained: Those that made loss.
        seconds: Time in the training loop before this process, where a run goes on.
    """

    tokens: int = 0
    trained: int = 0
    seconds: float = 0.0
