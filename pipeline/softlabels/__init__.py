"""Encode logits as SoftLabels (`encode`), and make target distributions of them (`target`).

Pure functions over tensors.
"""

from pipeline.softlabels.convert import check_conversion, convert
from pipeline.softlabels.encode import encode, encode_and_score, teacher_scores
from pipeline.softlabels.narrow import narrow
from pipeline.softlabels.ragged import concatenate, empty, most_likely, rows, split_rows
from pipeline.softlabels.residual import log_residual_bounds
from pipeline.softlabels.sampling import counter_uniforms, sample_tail
from pipeline.softlabels.target import (
    check_temperature,
    default_temperature,
    served_temperature,
    target,
)
from pipeline.softlabels.top import top_soft_labels

__all__ = [
    "check_conversion",
    "check_temperature",
    "concatenate",
    "convert",
    "counter_uniforms",
    "default_temperature",
    "empty",
    "encode",
    "encode_and_score",
    "log_residual_bounds",
    "most_likely",
    "narrow",
    "rows",
    "sample_tail",
    "served_temperature",
    "split_rows",
    "target",
    "teacher_scores",
    "top_soft_labels",
]
