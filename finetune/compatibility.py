"""Checks that base, data and settings fit together: after the data are prepared, before any weights are loaded."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.config_json import from_config_json
from finetune.errors import DataError, FinetuneError, ModelError
from finetune.export.needs import calibration_problems, rounding_problem
from finetune.files import first_error_line
from finetune.hardware.backends import CALIBRATED
from finetune.parameters import linear_layers
from finetune.prompt_problems import prompt_problems
from finetune.quantization.calibration import calibration_sequences
from finetune.quantization.checkpoint_format import CheckpointFormat, read_format
from finetune.quantization.config import PREQUANTIZED, QAT, QuantizationConfig
from finetune.quantization.packed_checkpoint import required_format
from finetune.run import STAGES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.config import RunConfig
    from finetune.model import ModelConfig, ModelFiles
    from finetune.products import PreparedData

BATCH_ROWS = 1024
NOT_BUILT = (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, AssertionError, ArithmeticError,
             RuntimeError)  # fmt: skip
"""What transformers raises for a config.json that describes no model."""


def check_compatibility(
    config: RunConfig, files: ModelFiles, tokenizer: PreTrainedTokenizerBase, data: PreparedData
) -> None:
    """Refuses what would otherwise fail, or be silently wrong, after the weights are loaded.

    Raises:
        FinetuneError: With every problem, not only the first.
    """
    check_stored_form(files.folder, method=config.quantization.method)
    check_generation_settings(files.folder)
    check_heldout(config, data)
    model = build_without_weights(config.model, files.folder)
    problems = [
        *target_problems(model, config.lora.targets),
        *mixture_problems(model, config),
        *length_problems(data, positions=_positions(model)),
        *prompt_problems(config, data, positions=_positions(model)),
        *_calibration_problems(config, data),
        *token_problems(data, tokenizer, rows=model.get_input_embeddings().weight.shape[0]),
    ]
    if config.lora.tokens:
        from finetune.lora.adapter import trained_token_ids

        trained_token_ids(model, config.lora.tokens, tokenizer)
    if problems:
        raise FinetuneError("\n".join(problems))


def check_stored_form(folder: Path, *, method: str) -> None:
    """Checks that a base whose weights are stored quantized is used as such, and no other: reads its config.json alone.

    Args:
        folder: Of the base.
        method: ``quantization.method``.

    Raises:
        ModelError: It is stored quantized in a way that cannot be read, or is not used so; or it is dense, and
            should not be.
    """
    if method == PREQUANTIZED:
        stored: CheckpointFormat | None = required_format(folder)
    else:
        stored = read_format(folder)
    if stored is None:
        return
    if method != PREQUANTIZED:
        raise ModelError(
            f"model.name: the weights in {folder} are stored quantized (quantization_config: {stored.title}), and "
            f"quantization.method={method} would round them again; choose quantization=prequantized, which trains on "
            "them as they are, or give the unquantized base that they were made from"
        )
    try:
        layers = linear_layers(from_config_json(folder))
    except ModelError:  # of a family whose dimensions are not known: its tensors are checked when they are loaded
        return
    uneven = {layer.name for layer in layers if stored.group_size and layer.in_features % stored.group_size}
    if uneven:
        raise ModelError(
            f"model.name: group_size={stored.group_size} in {folder / 'config.json'} does not divide the inputs of "
            f"{', '.join(sorted(uneven))}, which would need a shorter last group; give another checkpoint of the base"
        )


def check_groups(config: QuantizationConfig, folder: Path) -> None:
    """Checks by a base's config.json that its layers can be rounded in groups, for ``gptq``, ``awq`` and ``qat``.

    Raises:
        ModelError: Groups do not divide a layer, or the base has experts.
    """
    if config.method not in (*CALIBRATED, QAT):
        return
    group_size = None if config.method == QAT else config.group_size  # its blocks are checked when it is loaded
    experts = "experts are stacked weights, which this method does not round; choose quantization=nf4_double"
    if problem := rounding_problem(folder, group_size=group_size, experts=experts):
        raise ModelError(f"quantization={config.method}: {problem}")


def check_generation_settings(folder: Path) -> None:
    """Refuses generation settings that transformers loads and does not save again.

    Raises:
        ModelError: They are contradictory; the message is transformers' own.
    """
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return
    try:
        with tempfile.TemporaryDirectory(prefix="finetune-") as target:
            GenerationConfig.from_pretrained(folder).save_pretrained(target)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"model.name: {folder / 'generation_config.json'} has settings that transformers does not save again, so "
            f"no merged model could be written: {first_error_line(error)}; correct the file"
        ) from error


def check_heldout(config: RunConfig, data: PreparedData) -> None:
    """Refuses a run without held-out rows whose later stages measure on them.

    Raises:
        DataError: There are none.
    """
    if not data.heldout_rows and STAGES.index(config.run.until) >= STAGES.index("merge"):
        raise DataError(
            f"data: there are no held-out rows, and the stages after train up to run.until={config.run.until} measure "
            "on them; set data.heldout_path, data.heldout_share or data.heldout_rows, or run.until=train"
        )


def build_without_weights(config: ModelConfig, folder: Path) -> Any:
    """Builds the base on the meta device: its layers with their shapes, and nothing in memory.

    Raises:
        ModelError: Its config.json describes no model that transformers can build.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.model.text_only import config_of_text
    from finetune.trust import check_remote_code, offer

    trust = config.trust_remote_code
    check_remote_code(folder, config.remote_code)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = config_of_text(folder, trust_remote_code=trust) or AutoConfig.from_pretrained(
                folder, trust_remote_code=trust
            )
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=trust)
    except NOT_BUILT as error:
        raise ModelError(
            f"model.name={config.name}: {folder / 'config.json'} describes no model that transformers can build: "
            f"{type(error).__name__}: {first_error_line(error)}; correct it, or download it again{offer(folder)}"
        ) from error


def target_problems(model: Any, targets: list[str]) -> Iterator[str]:
    """Yields why ``lora.targets`` cannot be adapted in this architecture."""
    from transformers.pytorch_utils import Conv1D

    from finetune.lora.adapter import match_targets
    from finetune.lora.config import ALL_LINEAR

    turned = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Conv1D)}
    matched = turned if targets == [ALL_LINEAR] else turned & set(targets)
    if matched:
        yield (
            f"lora.targets: {', '.join(sorted(matched))} are Conv1D layers, as GPT-2 has them, with weights stored as "
            "(inputs, outputs); an adapter that is trained on their quantized form cannot be merged into them: use a "
            "base with linear layers"
        )
        return
    try:
        match_targets(model, targets)
    except ModelError as error:
        yield str(error)


def mixture_problems(model: Any, config: RunConfig) -> Iterator[str]:
    """Yields why experts cannot be adapted, or routers trained, in this architecture."""
    from finetune.quantization.expert_loading import reads_checkpoints_of
    from finetune.quantization.experts import fused_experts, is_covered

    lora, family = config.lora, model.config.get_text_config().model_type
    mixtures = [experts for _, experts in fused_experts(model)]
    problems = list(lora.mixture_problems(name=config.model.name, family=family, has_experts=bool(mixtures)))
    yield from problems
    if lora.adapts_experts and mixtures and not (all(map(is_covered, mixtures)) and reads_checkpoints_of(model)):
        yield (
            f"lora.experts={lora.experts}: experts of class {type(mixtures[0]).__name__} are computed by transformers "
            "alone and stay in 16 bit, so they cannot be adapted; set lora.experts=none"
        )


def length_problems(data: PreparedData, *, positions: int | None) -> Iterator[str]:
    """Yields which split has documents that are longer than the model has positions."""
    if positions is None:
        return
    for split in _splits(data):
        longer, longest, count = 0, 0, 0
        for lengths in _lengths(data.folder / split):
            longer += int((lengths > positions).sum())
            longest, count = max(longest, int(lengths.max(initial=0))), count + len(lengths)
        if longer:
            yield (
                f"data.max_tokens: {longer:,} of {count:,} documents in {split} are longer than the model's "
                f"{positions:,} positions (the longest has {longest:,} tokens), where it has learned nothing; set "
                f"data.max_tokens={positions}"
            )


def token_problems(data: PreparedData, tokenizer: PreTrainedTokenizerBase, *, rows: int) -> Iterator[str]:
    """Yields the first token of the data that the model's embedding has no row for."""
    if len(tokenizer) <= rows:
        return
    largest = max((largest for split in _splits(data) for largest in _largest_ids(data.folder / split)), default=0)
    if largest >= rows:
        yield (
            f"model.name: the tokenizer has {len(tokenizer):,} tokens and the model's embedding {rows:,} rows; the "
            f"data contain token {largest:,} ({tokenizer.convert_ids_to_tokens(largest)!r}): give the tokenizer that "
            "belongs to the model, or resize the embedding and save the model again"
        )


def _calibration_problems(config: RunConfig, data: PreparedData) -> Iterator[str]:
    """Yields why the base and exports cannot be calibrated on the rows, where the run gets as far as that."""
    quantization, train = config.quantization, data.folder / "train"
    if quantization.method in CALIBRATED:
        rows, tokens = quantization.calibration_rows, quantization.calibration_tokens
        calibration = calibration_sequences(train, rows=rows, tokens=tokens, seed=config.run.seed)
        if calibration.shortage:
            yield f"quantization={quantization.method}: {calibration.shortage}"
    if STAGES.index(config.run.until) >= STAGES.index("export"):
        yield from calibration_problems(config.export, folder=train, seed=config.run.seed)


def _positions(model: Any) -> int | None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(positions) if positions else None


def _splits(data: PreparedData) -> list[str]:
    return ["train", *(["heldout"] if data.heldout_rows else [])]


def _lengths(folder: Path) -> Iterator[Any]:
    """Yields the tokens of each document of a split, batch by batch, also of rejected answers."""
    import pyarrow.compute

    for table in _tables(folder):
        packed = "seq_lengths" in table.column_names
        documents = table["seq_lengths"] if packed else pyarrow.compute.list_value_length(table["input_ids"])
        yield (pyarrow.compute.list_flatten(documents) if packed else documents).to_numpy()
        if "rejected_input_ids" in table.column_names:
            yield pyarrow.compute.list_value_length(table["rejected_input_ids"]).to_numpy()


def _largest_ids(folder: Path) -> Iterator[int]:
    import pyarrow.compute

    for table in _tables(folder):
        for column in ("input_ids", "rejected_input_ids"):
            if column in table.column_names:
                yield pyarrow.compute.max(pyarrow.compute.list_flatten(table[column])).as_py() or 0


def _tables(folder: Path) -> Iterator[Any]:
    from datasets import load_from_disk

    yield from load_from_disk(str(folder)).with_format("arrow").iter(batch_size=BATCH_ROWS)
