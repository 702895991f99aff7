"""Tasks whose rows are questions: multiple choice and extractive question answering."""

from pipeline.tasks.answers.multiple_choice import MultipleChoice
from pipeline.tasks.answers.question_answering import QuestionAnswering

__all__ = ["MultipleChoice", "QuestionAnswering"]
