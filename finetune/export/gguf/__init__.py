"""Writes a model as one GGUF file for llama.cpp, with a Modelfile for Ollama.

Example::

    description = gguf.write(context, "gguf_q4_k_m", config["gguf_q4_k_m"])
    description["path"]  # "export/gguf_q4_k_m": model.gguf and Modelfile
"""

from finetune.export.gguf.writer import write

__all__ = ["write"]
