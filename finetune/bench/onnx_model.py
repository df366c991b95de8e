"""An ONNX graph as a causal language model of transformers: the same calls measure it, and ONNX Runtime computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class OnnxModel(PreTrainedModel, GenerationMixin):
    """A graph as `finetune.export.onnx` writes it.

    Args:
        config: Of the model that it was made from.
        file: The graph.
        threads: Number of threads.
    """

    def __init__(self, config: Any, file: Path, *, threads: int) -> None:
        import onnxruntime

        super().__init__(config)
        self.place = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        inputs = self.session.get_inputs()
        self.known = {entry.name for entry in inputs}
        self.cached = [entry for entry in inputs if entry.name.startswith("past_key_values")]

    def get_output_embeddings(self) -> None:
        """Returns None: the head is a part of the graph."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        **_: Any,
    ) -> Any:
        """Runs the graph, and adds new keys and values to the cache."""
        rows, new = input_ids.shape
        past: Any = DynamicCache() if past_key_values is None else past_key_values
        seen = past.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(rows, seen + new, dtype=torch.long)
        if position_ids is None:
            position_ids = torch.arange(seen, seen + new).expand(rows, new)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        feeds = {name: tensor.numpy() for name, tensor in inputs.items() if name in self.known}
        for number, entry in enumerate(self.cached):
            layer: Any = past.layers[number // 2] if seen else None
            empty = torch.empty(rows, entry.shape[1], 0, entry.shape[3])
            feeds[entry.name] = ((layer.values if number % 2 else layer.keys) if layer else empty).numpy()
        logits, *present = (torch.from_numpy(output) for output in self.session.run(None, feeds))
        if use_cache:
            for layer in range(len(present) // 2):
                keys, values = present[2 * layer], present[2 * layer + 1]
                past.update(keys[:, :, seen:], values[:, :, seen:], layer)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past)
