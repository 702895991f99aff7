"""SoftLabels as they are stored: the top of `sampled` in whole numbers of 1/steps, rounded so that the expectation stays exact."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from pipeline.records import Sampled, SoftLabels
from pipeline.softlabels.ragged import owners
from pipeline.softlabels.sampling import round_unbiased

#: Rounding takes the digits of u that sampling all but ignores: a class is so rarely kept by them
#: alone.
_LATER_DIGITS = 2.0**20


def narrow(soft: SoftLabels, uniforms: Tensor) -> SoftLabels:
    """Round what storing would round, without bias; other encodings than `sampled` come back as they are.

    Args:
        uniforms: (N,) float64 in [0, 1), those that the positions were sampled with.

    Returns:
        N positions whose top weights are multiples of 1/steps. E[weight] is unchanged, and the sum
            of a position's top changes by less than 1/steps.
    """
    if not isinstance(soft.encoding, Sampled):
        return soft
    steps = soft.encoding.steps
    values = soft.top_logprobs.double().exp() * steps
    whole = round_unbiased(values, owners(soft.top_offsets), (uniforms.cpu() * _LATER_DIGITS).frac())
    return dataclasses.replace(soft, top_logprobs=(whole.double() / steps).log().float())
