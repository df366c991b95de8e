"""Where each quantization backend runs. `place` decides by it and its errors quote it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Where one backend runs.

    Attributes:
        devices: Where it runs.
        source: Where this was seen; GPUs are by the library's documentation, not run here.
    """

    devices: tuple[str, ...]
    source: str


LIMITS = {
    "none": Limit(devices=("cpu", "cuda", "mps"), source="run here on CPU"),
    "nf4": Limit(devices=("cpu", "cuda"), source="bitsandbytes 0.50.2, run here on CPU"),
    "fp4": Limit(devices=("cpu", "cuda"), source="bitsandbytes 0.50.2, run here on CPU"),
    "int8": Limit(devices=("cpu", "cuda"), source="bitsandbytes 0.50.2, run here on CPU"),
}
