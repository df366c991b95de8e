"""The model group: which base model, and how it computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.architecture import ArchitectureConfig
from finetune.trust import remote_code_problems

DTYPES = ("auto", "bfloat16", "float16", "float32")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3")
UPCASTS = ("none", "norms", "all")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which base model, and in which numbers."""

    name: str
    """A local folder, a hub id, a ``.gguf`` file, or ``package:<module>/<file>.gguf`` from an installed package."""

    revision: str | None
    """Commit or tag on the hub; None takes the newest, and the commit that was taken is recorded."""

    dtype: str
    """Numbers of the unquantized weights and of the computation; ``auto`` lets `place` decide."""

    attention: str
    """transformers' attention implementation; ``auto`` lets `place` decide."""

    upcast: str
    """Frozen parts turned to float32 before training: ``none``, ``norms``, or ``all`` (what peft does: norms,
    embedding and head). They are frozen, so the wider numbers buy nothing but a float32 residual stream."""

    remote_code: dict[str, str]
    """Code of the model's own that may run: the SHA-256 of each of its Python files, by name. Empty: none runs. Repository and
    commit are ``name`` and ``revision``."""

    architecture: ArchitectureConfig | None
    """Dimensions, so that `plan` needs no download; None where only the model's own config.json knows them."""

    def problems(self) -> Iterator[str]:
        for key, value, allowed in (
            ("dtype", self.dtype, DTYPES),
            ("attention", self.attention, ATTENTIONS),
            ("upcast", self.upcast, UPCASTS),
        ):
            if value not in allowed:
                yield f"model.{key} must be one of {', '.join(allowed)}; got {value!r}"
        if not self.name.strip():
            yield "model.name is empty; give a folder, a hub id such as org/model, or a .gguf file"
        yield from remote_code_problems(
            self.remote_code, revision=None if looks_local(self.name) else self.revision or "none"
        )

    @property
    def trust_remote_code(self) -> bool:
        """What transformers is told."""
        return bool(self.remote_code)


def looks_local(name: str) -> bool:
    """Whether a name is a path here; anything else is looked for on the hub."""
    return Path(name).expanduser().exists() or name.startswith(("/", "./", "../", "~"))
