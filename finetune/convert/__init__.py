"""Translates training files of axolotl, LLaMA-Factory and TRL to an experiment.

Example::

    translation = translate(read_file(Path("qlora.yml")))
    text = experiment_text(translation)
"""

from finetune.convert.experiment import experiment_text
from finetune.convert.read import TrainingFile, read_file
from finetune.convert.translate import Translation, translate

__all__ = ["TrainingFile", "Translation", "experiment_text", "read_file", "translate"]
