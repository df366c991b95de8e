"""Exports the merged model as one ONNX graph with a cache of keys and values, which ONNX Runtime can generate with.

transformers' own exporter (`torch.onnx`) makes the graph in a separate process. Its inputs and outputs have the names
of optimum and transformers.js: ``past_key_values.<layer>.key`` goes in, ``present.<layer>.key`` comes out.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune.errors import ExportError
from finetune.export.config import ExportConfig
from finetune.export.context import ExportContext
from finetune.export.needs import check_packages
from finetune.inference.chat import save_tokenizer
from finetune.products import ExportResult

FILE = "model.onnx"
BITS = {"int8": 8, "int4": 4}
BLOCK = 32
"""Weights of a row that share a scale and a zero point in int8 and int4."""

DYNAMIC = "int8_dynamic"
"""Weights in int8 with a scale for each output, and each matrix of activations in int8 while the graph runs."""

TRACED_ROWS, TRACED_SEEN, TRACED_NEW = 2, 5, 3
"""Sizes of the traced call. All differ, so that the tracer does not treat two of them as the same size."""


def write(context: ExportContext, name: str, settings: ExportConfig) -> ExportResult:
    """Traces the merged model in float32, quantizes its matrices if configured, and checks it in ONNX Runtime.

    Raises:
        ExportError: A package is missing, the disk is too small, torch cannot trace this model, or the graph differs.
    """
    from finetune.inference.adapted import free_memory
    from finetune.inference.fresh_process import FreshProcessError, run_in_fresh_process

    dtype = settings.dtype or "float32"
    check_packages({name: settings})
    _check_space(context, name, dtype)
    source, target = context.merged.folder / "model", context.scratch / name
    merged = context.load(context.spec.dense(source, dtype="float32").on("cpu"), settings)
    wanted = context.expected_output(merged, settings)
    del merged
    free_memory()
    target.mkdir()
    for file in ("config.json", "generation_config.json"):
        shutil.copyfile(source / file, target / file)
    save_tokenizer(context.chat.tokenizer, target)
    request = {
        "source": source.resolve(),
        "target": target.resolve(),
        "dtype": dtype,
        "threads": context.spec.placement.threads,
        "trust_remote_code": context.spec.config.trust_remote_code,
    }
    try:
        run_in_fresh_process("finetune.export.onnx", request, work=context.scratch)
    except FreshProcessError as error:
        raise ExportError(f"export.{name}: torch.onnx cannot make a graph of this model: {error}") from error
    ends, packages, runtime = context.chat.ends, ["onnxruntime"], "finetune.export.onnx_runtime"
    snippet = onnx_snippet(name, ends=ends)
    parity = context.check(name, settings, wanted, snippet=snippet, ends=ends, packages=packages, runtime=runtime)
    context.snippets[f"The merged model in {dtype}, in ONNX Runtime"] = snippet
    return context.publish(name, settings, parity)


def _check_space(context: ExportContext, name: str, dtype: str) -> None:
    # The graph in float32, and the quantized one, whose embedding stays in float32.
    size = context.merged_bytes * (2 if dtype == "float32" else 4)
    context.require_disk(name, size / (2 if context.merged_dtype == "float32" else 1))


def onnx_snippet(folder: str, *, ends: list[int]) -> str:
    """Returns code that generates with ONNX Runtime and numpy; it needs transformers only for the tokenizer."""
    lines = [
        "import numpy as np",
        "import onnxruntime",
        "from transformers import AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
        f'session = onnxruntime.InferenceSession({f"{folder}/{FILE}"!r}, providers=["CPUExecutionProvider"])',
        'cached = [entry for entry in session.get_inputs() if entry.name.startswith("past_key_values")]',
        "empty = {entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32) for entry in cached}",
        "",
        "",
        "def forward(tokens, past):",
        '    """Logits after each token, shape (tokens, vocabulary), and the cache for the next call."""',
        "    seen = next(iter(past.values())).shape[2]",
        "    mask, positions = np.ones((1, seen + len(tokens)), np.int64), np.arange(seen, seen + len(tokens))[None]",
        '    inputs = {"input_ids": np.array([tokens]), "attention_mask": mask, "position_ids": positions}',
        "    known = {entry.name for entry in session.get_inputs()}",
        "    inputs = {name: value for name, value in inputs.items() if name in known}",
        "    logits, *present = session.run(None, inputs | past)",
        "    return logits[0], dict(zip(past, present))",
        "",
        "",
        "def generate(tokens, limit):",
        '    """The greedy answer, its end token included."""',
        "    (logits, past), answer = forward(tokens, empty), []",
        f"    while len(answer) < limit and not set(answer[-1:]) & set({ends}):",
        "        answer.append(int(logits[-1].argmax()))",
        "        logits, past = forward(answer[-1:], past)",
        "    return answer",
        "",
        "",
        'messages = [{"role": "user", "content": "Hello!"}]',
        'prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]',
        "print(tokenizer.decode(generate(prompt, 32), skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def make(request: dict[str, Any]) -> dict[str, Any]:
    """Writes the graph, in the other process.

    Needs at most about three times the float32 weights in memory: torch's, and those of a graph while it is quantized.
    """
    import torch

    torch.set_num_threads(request["threads"])
    file = Path(request["target"]) / FILE
    trace(Path(request["source"]), file, trust_remote_code=request["trust_remote_code"])
    if request["dtype"] != "float32":
        quantize(file, file, dtype=request["dtype"])
    return {}


def trace(source: Path, file: Path, *, trust_remote_code: bool) -> None:
    """Writes the graph of a checkpoint in float32, its weights in a file next to it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, trust_remote_code=trust_remote_code
    ).eval()
    inputs, shapes = _example(model)
    program = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True, dynamic_shapes=shapes)).program
    _rename(program.graph)
    OnnxExporter.save_program(program, file)


def quantize(source: Path, target: Path, *, dtype: str) -> None:
    """Quantizes the matrices of a graph's linear layers and leaves the rest in float32.

    Args:
        source: The graph in float32.
        target: The file to write, which may be the same.
        dtype: ``int8`` or ``int4`` for weights in blocks, ``int8_dynamic`` for weights and activations.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(source)
    if source == target:
        for old in (source, source.with_name(f"{source.name}.data")):
            old.unlink()
    if dtype == DYNAMIC:
        _quantize_dynamically(model, target)
        return
    quantizer = MatMulNBitsQuantizer(model, bits=BITS[dtype], block_size=BLOCK, is_symmetric=False)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=True)


def _quantize_dynamically(model: Any, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        model,
        target,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )


def _example(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the inputs of a call with a cache, and its dynamic sizes: rows, new tokens, cached tokens."""
    import inspect

    import torch
    from transformers import DynamicCache

    ids = torch.arange(TRACED_ROWS * (TRACED_SEEN + TRACED_NEW)).reshape(TRACED_ROWS, -1)
    ids = ids % model.config.get_text_config().vocab_size
    cache = DynamicCache()  # without the model's config it keeps all tokens; the mask applies a sliding window
    with torch.no_grad():
        model(input_ids=ids[:, :TRACED_SEEN], past_key_values=cache, use_cache=True)
    inputs = {"input_ids": ids[:, TRACED_SEEN:], "attention_mask": torch.ones_like(ids)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(TRACED_SEEN, TRACED_SEEN + TRACED_NEW)[None].repeat(TRACED_ROWS, 1)
    free = torch.export.Dim.AUTO
    shapes: dict[str, Any] = {name: {0: free, 1: free} for name in inputs}
    shapes["past_key_values"] = [{0: free, 2: free}] * (2 * len(cache.layers))
    return {**inputs, "past_key_values": cache}, shapes


def _rename(graph: Any) -> None:
    """Renames ``input.past_key_values.layers.0.keys`` of transformers to the usual ``past_key_values.0.key``."""
    for values, prefix in ((graph.inputs, "past_key_values"), (graph.outputs, "present")):
        for value in values:
            if ".layers." in value.name:
                layer, kind = value.name.split(".layers.")[1].split(".")
                value.name = f"{prefix}.{layer}.{kind.removesuffix('s')}"


if __name__ == "__main__":
    from finetune.inference.fresh_process import serve_request

    serve_request(make)
