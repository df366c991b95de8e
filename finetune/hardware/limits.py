"""What each quantization backend can do where. README's table and the errors quote it; a test holds them together."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What one backend can do.

    Attributes:
        devices: Where it runs.
        trains: Whether LoRA trains on top of it.
        saves: Whether its quantized weights can be saved and reloaded.
        source: Where this was seen.
    """

    devices: tuple[str, ...]
    trains: bool
    saves: bool
    source: str


LIMITS = {
    "none": Limit(devices=("cpu", "cuda", "mps"), trains=True, saves=True, source="run here on CPU"),
    "nf4": Limit(devices=("cpu", "cuda"), trains=True, saves=True, source="bitsandbytes 0.50.2, run here on CPU"),
    "fp4": Limit(devices=("cpu", "cuda"), trains=True, saves=True, source="bitsandbytes 0.50.2, run here on CPU"),
    "int8": Limit(devices=("cpu", "cuda"), trains=True, saves=True, source="bitsandbytes 0.50.2, run here on CPU"),
}
