"""Training: TRL's trainer on the adapted base, with checkpoints, resume and out-of-memory retry.

job = TrainingJob(config=config.train, optim=config.optim, trainable=trainable, data=data, seed=1)
adapter = train_adapter(job, folder=Path("outputs/run/train"), trackers=Trackers([]), ranks=Ranks({}))
"""

from finetune.train.config import TrainConfig
from finetune.train.stage import join_training, train_adapter

__all__ = ["TrainConfig", "join_training", "train_adapter"]
