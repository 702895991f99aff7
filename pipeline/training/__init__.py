"""Stage 2: train a student from a cache, without the teacher; and before stage 1, fine-tune a teacher."""

from pipeline.training.losses import distillation_loss
from pipeline.training.run import train_student
from pipeline.training.trainer import DistillationTrainer

__all__ = ["DistillationTrainer", "distillation_loss", "train_student"]
