"""Tasks whose rows are questions: answers to choose from, and answers that stand in a text."""

from pipeline.tasks.answers.multiple_choice import MultipleChoice
from pipeline.tasks.answers.question_answering import QuestionAnswering

__all__ = ["MultipleChoice", "QuestionAnswering"]
