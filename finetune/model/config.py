"""The model group: the base model, its dtype and its attention."""

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
    """Selects the base model, its dtype and its attention."""

    name: str
    """A local folder, a hub id, a ``.gguf`` file, or ``package:<module>/<file>.gguf`` from an installed package."""

    revision: str | None
    """Commit or tag on the hub; None takes the newest. The resolved commit is recorded."""

    dtype: str
    """Dtype of the unquantized weights and of the computation; ``auto`` lets `place` decide."""

    attention: str
    """transformers' attention implementation; ``auto`` lets `place` decide."""

    upcast: str
    """Frozen parts converted to float32 before training: ``none``, ``norms``, or ``all`` (norms, embedding and head, as
    peft does). They are frozen, so the only effect is a float32 residual stream."""

    remote_code: dict[str, str]
    """Code in the model's repository that may run: the SHA-256 of each of its Python files, by name. Empty: none runs.
    Repository and commit are ``name`` and ``revision``."""

    template: str | None = None
    """Chat template for a tokenizer that ships none: a name as in ``data.template``, which replaces it."""

    architecture: ArchitectureConfig | None
    """Dimensions, so that `plan` needs no download; None reads them from the model's config.json."""

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
        """The argument of transformers' ``from_pretrained``."""
        return bool(self.remote_code)


def looks_local(name: str) -> bool:
    """Returns whether a name is a local path; other names are looked up on the hub."""
    return Path(name).expanduser().exists() or name.startswith(("/", "./", "../", "~"))
