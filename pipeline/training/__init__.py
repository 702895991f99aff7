"""Training: distil a student from a cache without the teacher, and fine-tune a teacher."""

from pipeline.training.losses import distillation_loss
from pipeline.training.run import train_student
from pipeline.training.trainer import DistillationTrainer

__all__ = ["DistillationTrainer", "distillation_loss", "train_student"]
