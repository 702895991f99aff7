"""The most likely classes that a server gives: joined, made soft labels, kept and compared."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from pipeline.errors import ServerError
from pipeline.records import Encoding, FirstAnswer, SoftLabels, TokenizedExample, TopP
from pipeline.servers.scoring import TopLogprobs
from pipeline.softlabels.outside import log_outside
from pipeline.softlabels.ragged import offsets_of

logger = logging.getLogger(__name__)

#: Nats by which two answers to one row may differ without a warning, and in the mean at all. The
#: second is more than half precision explains.
SAME, CLOSE = 1e-3, 0.1
#: Log-probabilities below this are not compared.
_LEAST = -10.0
#: Positions of the first answer that are kept, and what is kept of a probability of 0.
_MOST_POSITIONS, _ZERO = 64, -1e4


def join(parts: Sequence[TopLogprobs]) -> TopLogprobs:
    """The predictions of one row, from those of its parts."""
    if len(parts) == 1:
        return parts[0]
    return TopLogprobs(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "logprobs", "own"))
    )


def top_labels(
    ids: np.ndarray, logprobs: np.ndarray, encoding: Encoding, num_classes: int, rows: int | None = None
) -> SoftLabels:
    """Soft labels from the most likely classes; the mass outside is 1 - sum(p), as far as that can be.

    Args:
        ids: (N, K) int64, by falling log-probability; ids from `num_classes` on are the model's
            padding, and count to the mass outside.
        logprobs: (N, K) float64, nats, at T = 1; -inf: not there.
        rows: classes of the model with its padding; None: not known.
    """
    kept = np.isfinite(logprobs) & (ids < num_classes)
    mass = np.where(kept, np.exp(logprobs), 0.0)
    if isinstance(encoding, TopP):
        kept &= np.cumsum(mass, -1) - mass < encoding.p
        mass = np.where(kept, mass, 0.0)
    counts = kept.sum(-1)
    with np.errstate(divide="ignore"):  # no class outside
        most = np.log(np.maximum((rows or 0) - counts, 0)) + logprobs[:, -1]
    is_known = kept.all(-1) & (rows is not None)  # else more likely ones are outside too
    residual = log_outside(mass.sum(-1), counts, num_classes, np.where(is_known, most, np.inf))
    return SoftLabels(
        encoding,
        num_classes,
        top_offsets=offsets_of(torch.from_numpy(counts)),
        top_ids=torch.from_numpy(ids[kept]),
        top_logprobs=torch.from_numpy(logprobs[kept]).float(),
        tail_offsets=torch.zeros(len(counts) + 1, dtype=torch.int64),
        tail_ids=torch.zeros(0, dtype=torch.int64),
        log_residuals=torch.from_numpy(residual).float().unsqueeze(-1),
    )


def first_answer(row: TokenizedExample, found: TopLogprobs) -> FirstAnswer:
    """What is kept of an answer, to compare later ones with."""
    ids, logprobs, own = (getattr(found, name)[:_MOST_POSITIONS] for name in ("ids", "logprobs", "own"))
    logprobs, own = (np.round(np.maximum(each, _ZERO), 6).tolist() for each in (logprobs, own))
    return FirstAnswer(
        tuple(row.input_ids.tolist()), tuple(map(tuple, ids.tolist())), tuple(map(tuple, logprobs)), tuple(own)
    )


def kept_answer(answer: FirstAnswer) -> TopLogprobs:
    """The predictions that were kept."""
    return TopLogprobs(
        np.asarray(answer.top_ids, dtype=np.int64),
        np.asarray(answer.top_logprobs, dtype=np.float64),
        np.asarray(answer.own_logprobs, dtype=np.float64),
    )


def difference(one: TopLogprobs, other: TopLogprobs) -> tuple[float, float]:
    """Nats: mean and largest difference of the log-probabilities that both have, and that are not tiny.

    Positions that only one of the two has are left out. Infinite where no class of a position is in
    both.
    """
    count = min(len(one.own), len(other.own))
    apart = [np.abs(one.own[:count] - other.own[:count])[one.own[:count] > _LEAST]]
    for n in range(count):
        _, here, there = np.intersect1d(one.ids[n], other.ids[n], return_indices=True)
        if not len(here):
            return np.inf, np.inf
        values = one.logprobs[n][here]
        apart.append(np.abs(values - other.logprobs[n][there])[values > _LEAST])
    every = np.concatenate(apart)
    return (float(every.mean()), float(every.max())) if len(every) else (0.0, 0.0)


def difference_to_logprobs(served: TopLogprobs, local: np.ndarray) -> tuple[float, float]:
    """Nats: as `difference`, to the log-probabilities of all classes.

    Args:
        local: (N, V) float.
    """
    num_classes = local.shape[-1]
    found = np.take_along_axis(local, np.where(served.ids < num_classes, served.ids, 0), -1)
    apart = np.abs(served.logprobs - found)[(served.logprobs > _LEAST) & (served.ids < num_classes)]
    return float(apart.mean()), float(apart.max())


def check_alike(url: str, found: TopLogprobs, expected: TopLogprobs, whom: str, what: str) -> None:
    """Compare answers to one row.

    Raises:
        ServerError: they are not of one model.
    """
    mean, worst = difference(expected, found)
    if not mean <= CLOSE:
        raise ServerError(
            f"{url}: its log-probabilities of one row differ from those of {whom} by {mean:.2g} nats in the mean (expected at most {CLOSE:g}): {what}"
        )
    if worst > SAME:
        logger.warning(
            "%s: its log-probabilities of one row differ from those of %s by up to %.2g nats: a capture that is made again will differ as much",
            url,
            whom,
            worst,
        )
