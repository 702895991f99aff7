"""Likelihood matching over aligned spans: the text's negative log-likelihood by position, and its comparison with the teacher's by span."""

from pipeline.training.spans.compare import SPAN_TEMPERATURE, check_spans, owned, span_loss, span_sums, span_temperature
from pipeline.training.spans.nll import fused_nll

__all__ = ["SPAN_TEMPERATURE", "check_spans", "fused_nll", "owned", "span_loss", "span_sums", "span_temperature"]
