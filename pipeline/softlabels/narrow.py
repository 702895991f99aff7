"""Unbiased rounding of the top weights of `sampled` to the resolution in which they are stored."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from pipeline.records import Sampled, SoftLabels
from pipeline.softlabels.ragged import owners
from pipeline.softlabels.sampling import round_unbiased

#: Rounding uses low-order digits of the uniform number, which hardly affect which classes are
#: sampled.
_LATER_DIGITS = 2.0**20


def narrow(soft: SoftLabels, uniforms: Tensor) -> SoftLabels:
    """Round the top weights of `sampled` to multiples of 1/steps, without bias.

    Other encodings are returned unchanged.

    Args:
        uniforms: (N,) float64 in [0, 1), with which the positions were sampled.

    Returns:
        N positions whose top weights are multiples of 1/steps. E[weight] is unchanged, and the sum
        of a position's top weights changes by less than 1/steps.
    """
    if not isinstance(soft.encoding, Sampled):
        return soft
    steps = soft.encoding.steps
    values = soft.top_logprobs.double().exp() * steps
    whole = round_unbiased(values, owners(soft.top_offsets), (uniforms.cpu() * _LATER_DIGITS).frac())
    return dataclasses.replace(soft, top_logprobs=(whole.double() / steps).log().float())
