"""The tasks (classification, language modelling, ...), each a module behind one `Task` protocol.

All code that depends on the task is here. No other package branches on the task's name.
"""

from pipeline.errors import ConfigError
from pipeline.tasks.answers import MultipleChoice, QuestionAnswering
from pipeline.tasks.causal_lm import CausalLM
from pipeline.tasks.images import ImageClassification
from pipeline.tasks.masked_lm import MaskedLM
from pipeline.tasks.multi_label_classification import MultiLabelClassification
from pipeline.tasks.protocol import (
    Task,
    check_columns,
    check_ids,
    embedding_rows,
    free_pad_id,
    ids_beyond,
    kept_pad_id,
    label_column,
    may_lack_head,
    named_ids,
    needs_label_column,
    token_block,
)
from pipeline.tasks.scores import RANKING, ScoredTexts
from pipeline.tasks.seq2seq import Seq2SeqLM
from pipeline.tasks.sequence_classification import SequenceClassification
from pipeline.tasks.token_classification import TokenClassification

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SequenceClassification(),
        CausalLM(),
        TokenClassification(),
        MultiLabelClassification(),
        ScoredTexts(),
        RANKING,
        MaskedLM(),
        Seq2SeqLM(),
        ImageClassification(),
        MultipleChoice(),
        QuestionAnswering(),
    )
}


def get_task(name: str) -> Task:
    """Return the task with this name.

    Raises:
        ConfigError: no task has this name.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise ConfigError(f"task {name!r}: expected one of {', '.join(TASKS)}") from None


def writing_task() -> Task:
    """Return the task whose models generate text from a prompt."""
    return next(task for task in TASKS.values() if task.continues_prompts)


__all__ = [
    "TASKS",
    "Task",
    "check_columns",
    "check_ids",
    "embedding_rows",
    "free_pad_id",
    "get_task",
    "ids_beyond",
    "kept_pad_id",
    "label_column",
    "may_lack_head",
    "named_ids",
    "needs_label_column",
    "token_block",
    "writing_task",
]
