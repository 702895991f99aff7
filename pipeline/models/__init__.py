"""Load models and adapters, check and fingerprint them, and make students from teachers."""

from pipeline.models.adapters import LABELS
from pipeline.models.fingerprint import model_info, public_name, tokenizer_info
from pipeline.models.load import (
    LoadedModel,
    check_isolation,
    choose_max_length,
    class_names,
    length_within,
    load_model,
    load_tokenizer,
    longest_input,
    pad_id,
    set_chat_template,
)

__all__ = [
    "LABELS",
    "LoadedModel",
    "check_isolation",
    "choose_max_length",
    "class_names",
    "length_within",
    "load_model",
    "load_tokenizer",
    "longest_input",
    "model_info",
    "pad_id",
    "public_name",
    "set_chat_template",
    "tokenizer_info",
]
