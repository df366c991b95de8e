"""Bugs that have ruined real fine-tuning runs: code that plants each, and the check that has to catch it."""

import dataclasses
import json
import resource
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from datasets import Dataset, load_from_disk

from finetune.kernels.autograd import GatedActivation
from finetune.kernels.documents import attending_by
from finetune.quantization import quantized_layers
from tests.fixtures.preflight import Plant, Scene

IGNORED = -100


@dataclass(frozen=True)
class Bug:
    """A bug that is planted.

    Attributes:
        name: Its name in the table.
        caught_by: Name of the check.
        plant: Changes a scene.
        level: The level that has this check.
    """

    name: str
    caught_by: str
    plant: Plant
    level: str = "quick"


def spoiled_batches(scene: Scene, spoil: Any) -> None:
    """Makes the trainer's collator replace the labels of its micro-batches by those of ``spoil``."""
    make = scene.make_trainer

    def spoiled(*arguments: Any, **inputs: Any) -> Any:
        trainer = make(*arguments, **inputs)
        collate = trainer.data_collator

        def collated(rows: Any) -> Any:
            batch = collate(rows)
            return {**batch, "labels": spoil(batch)}

        trainer.data_collator = collated
        return trainer

    scene.make_trainer = spoiled


def drop_the_mask(scene: Scene, _: pytest.MonkeyPatch) -> None:
    spoiled_batches(scene, lambda batch: batch["input_ids"])


def mask_the_answers(scene: Scene, _: pytest.MonkeyPatch) -> None:
    def inverted(batch: Any) -> Any:
        return torch.where(batch["labels"] == IGNORED, batch["input_ids"], IGNORED)

    spoiled_batches(scene, inverted)


def pad_is_the_end(scene: Scene, _: pytest.MonkeyPatch) -> None:
    """Takes one token for pad and end, and masks padding by its id."""
    end = scene.trainable.tokenizer.eos_token_id
    spoiled_batches(scene, lambda batch: batch["labels"].masked_fill(batch["labels"] == end, IGNORED))


def rewrite_rows(scene: Scene, labels: Any) -> None:
    folder = scene.job.data.folder / "train"
    rows = [{**row, "labels": labels(row)} for row in load_from_disk(str(folder))]
    other = folder.with_name("other")
    Dataset.from_list(rows).save_to_disk(str(other))
    folder.rename(folder.with_name("was"))
    other.rename(folder)


def train_the_questions(scene: Scene, _: pytest.MonkeyPatch) -> None:
    rewrite_rows(scene, lambda row: row["input_ids"])


def never_train_the_end(scene: Scene, _: pytest.MonkeyPatch) -> None:
    end = scene.trainable.tokenizer.eos_token_id
    rewrite_rows(scene, lambda row: [IGNORED if label == end else label for label in row["labels"]])


def contaminate(scene: Scene, _: pytest.MonkeyPatch) -> None:
    """Hides positions and borders from attention: documents of a row read each other."""
    decoder = scene.model.get_base_model().model
    forward = decoder.forward
    arguments_of_documents = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

    def contaminated(*arguments: Any, **inputs: Any) -> Any:
        with attending_by(None):
            return forward(
                *arguments, **{name: value for name, value in inputs.items() if name not in arguments_of_documents}
            )

    decoder.forward = contaminated


def sum_the_means(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds up the micro-batches' means: eight micro-batches make a step eight times as long."""
    from finetune.train.sft_trainer import Trainer

    def mean(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        return self.fusion.loss(self.accelerator.unwrap_model(model), inputs) / (inputs["labels"] != IGNORED).sum()

    monkeypatch.setattr(Trainer, "compute_loss", mean)


def mean_the_means(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Averages the micro-batches' means: short answers count for more than long ones."""
    from finetune.train.sft_trainer import Trainer

    def mean(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        divisor = (inputs["labels"] != IGNORED).sum() * self.args.gradient_accumulation_steps
        return self.fusion.loss(self.accelerator.unwrap_model(model), inputs) / divisor

    monkeypatch.setattr(Trainer, "compute_loss", mean)


def detach_the_loss(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.train.sft_trainer import Trainer

    sound = Trainer.compute_loss
    monkeypatch.setattr(
        Trainer, "compute_loss", lambda *arguments, **named: sound(*arguments, **named).detach().requires_grad_()
    )


def parameter(scene: Scene, part: str) -> Any:
    return next(p for name, p in scene.model.named_parameters() if part in name)


def freeze_a_matrix(scene: Scene, _: pytest.MonkeyPatch) -> None:
    parameter(scene, "v_proj.lora_A").requires_grad_(False)


def cut_a_gradient(scene: Scene, _: pytest.MonkeyPatch) -> None:
    parameter(scene, "v_proj.lora_A").register_hook(torch.zeros_like)


def train_a_base_weight(scene: Scene, _: pytest.MonkeyPatch) -> None:
    scene.model.get_base_model().model.norm.weight.requires_grad_(True)


def start_away_from_zero(scene: Scene, _: pytest.MonkeyPatch) -> None:
    parameter(scene, "lora_B").data += 0.5


def repack_in_evaluation(scene: Scene, _: pytest.MonkeyPatch) -> None:
    """Does what bitsandbytes does on AVX512-BF16 CPUs, on every CPU."""
    layer = next(iter(quantized_layers(scene.model).values()))

    def repack(module: Any, inputs: Any, output: Any) -> None:
        if not module.training:
            module.weight.data = module.weight.data.roll(1, 0)

    layer.register_forward_hook(repack)


def requantize_in_save(scene: Scene, _: pytest.MonkeyPatch) -> None:
    """Packs the base again in a save, with another block's constants."""
    save = scene.model.save_pretrained

    def requantizing(*arguments: Any, **named: Any) -> None:
        save(*arguments, **named)
        for layer in quantized_layers(scene.model).values():
            layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.roll(1)
            layer.weight.data = layer.weight.data.roll(1, 0)

    scene.model.save_pretrained = requantizing


def change_in_evaluation(scene: Scene, _: pytest.MonkeyPatch) -> None:
    """Changes the adapter in an evaluation: what is saved afterwards differs."""
    matrix = parameter(scene, "lora_A")

    def drift(module: Any, inputs: Any, output: Any) -> None:
        if not module.training:
            matrix.data.mul_(1.001)

    scene.model.get_base_model().register_forward_hook(drift)


def round_in_save(scene: Scene, _: pytest.MonkeyPatch) -> None:
    """Writes the adapter in so few bits that half of it is lost."""
    save = scene.model.save_pretrained

    def rounding(*arguments: Any, **named: Any) -> None:
        before = [(p, p.detach().clone()) for p in scene.model.parameters() if p.requires_grad]
        for p, _ in before:
            p.data = (p.data / p.data.abs().max()).round() * p.data.abs().max()
        save(*arguments, **named)
        for p, old in before:
            p.data = old

    scene.model.save_pretrained = rounding


def another_base(scene: Scene, _: pytest.MonkeyPatch) -> None:
    """Makes later stages load a base that is quantized in another way than the one in memory."""
    spec = scene.trainable.spec
    scene.trainable.spec = dataclasses.replace(spec, quantization=dataclasses.replace(spec.quantization, method="fp4"))


def stand_still(scene: Scene, _: pytest.MonkeyPatch) -> None:
    scene.job = dataclasses.replace(scene.job, optim=dataclasses.replace(scene.job.optim, learning_rate=0.0))


def write_plan(scene: Scene, **changes: Any) -> None:
    plan = {
        "known": True,
        "phases": {"step": {"weights": 1}},
        "needed_bytes": 1,
        "least_bytes": 1,
        "later": {"merge": "1 B", "eval": "1 B"},
        "disk": {"base": 1, "checkpoints": 1, "adapter": 1, "merged": 1},
        **changes,
    }
    (scene.run / "plan").mkdir()
    (scene.run / "plan" / "manifest.json").write_text(json.dumps({"product": plan}))


def too_large_to_train(scene: Scene, _: pytest.MonkeyPatch) -> None:
    write_plan(scene, needed_bytes=2 * 10**16, least_bytes=10**16)


def disk_too_small(scene: Scene, _: pytest.MonkeyPatch) -> None:
    write_plan(scene, disk={"base": 1, "checkpoints": 10**18, "adapter": 1, "merged": 1})


def disk_full(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills the disk while the adapter is being saved."""
    save = scene.model.save_pretrained

    def full(*arguments: Any, **named: Any) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            save(*arguments, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    scene.model.save_pretrained = full


def double_a_gradient(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = GatedActivation.backward
    monkeypatch.setattr(GatedActivation, "backward", lambda self, grad, raw: 2 * sound(self, grad, raw))


BUGS = (
    Bug("mask dropped: questions are trained on too", "trained_text", drop_the_mask),
    Bug("mask inverted: answers are not trained on", "trained_text", mask_the_answers),
    Bug("pad token is the end of turn and masked by its id", "trained_text", pad_is_the_end),
    Bug("prepared rows are not those of the ledger", "trained_text", train_the_questions),
    Bug("end of turn is masked in the data", "trained_text", never_train_the_end),
    Bug("packed documents read each other", "packing", contaminate),
    Bug("accumulation not scaled: means are added up", "accumulation", sum_the_means),
    Bug("accumulation scaled by micro-batches: mean of means", "accumulation", mean_the_means),
    Bug("an adapter matrix is frozen", "gradients", freeze_a_matrix),
    Bug("a kernel cuts a matrix's gradient off", "gradients", cut_a_gradient),
    Bug("a base weight trains", "gradients", train_a_base_weight),
    Bug("B does not start at 0", "identity", start_away_from_zero),
    Bug("an evaluation repacks 4-bit weights", "evaluation", repack_in_evaluation),
    Bug("a save quantizes the base again", "evaluation", requantize_in_save),
    Bug("an evaluation changes what is saved", "evaluation", change_in_evaluation),
    Bug("the disk is full while the adapter is saved", "evaluation", disk_full),
    Bug("a fused kernel returns twice the gradient", "fused_layers", double_a_gradient),
    Bug("training needs more memory than there is", "memory_and_disk", too_large_to_train),
    Bug("the checkpoints need more disk than there is", "memory_and_disk", disk_too_small),
    Bug("the learning rate is 0", "learning", stand_still, "full"),
    Bug("the loss is detached from the model", "learning", detach_the_loss, "full"),
    Bug("the end of turn is never trained on", "ending", never_train_the_end, "full"),
    Bug("the adapter is saved in too few bits", "reload", round_in_save, "full"),
    Bug("later stages load another base", "reload", another_base, "full"),
)
