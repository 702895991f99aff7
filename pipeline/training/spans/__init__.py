"""Likelihood matching over aligned spans of text, for students with another tokenizer.

`nll` computes the text's negative log-likelihood at each position, and `compare` compares it with
the teacher's over each span.
"""

from pipeline.training.spans.compare import SPAN_TEMPERATURE, check_spans, owned, span_loss, span_sums, span_temperature
from pipeline.training.spans.nll import fused_nll

__all__ = ["SPAN_TEMPERATURE", "check_spans", "fused_nll", "owned", "span_loss", "span_sums", "span_temperature"]
