"""Top log-probabilities from servers: joining, conversion to soft labels, storage, comparison."""

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

#: Allowed differences of two answers for one row, in nats: largest one without a warning, and mean
#: without an error. Half precision does not explain a larger mean.
SAME, CLOSE = 1e-3, 0.1
#: Smaller log-probabilities are not compared.
_LEAST = -10.0
#: Number of positions of the first answer that are stored, and the stored value of log 0.
_MOST_POSITIONS, _ZERO = 64, -1e4


def join(parts: Sequence[TopLogprobs]) -> TopLogprobs:
    """Concatenate the predictions of the parts of one row."""
    if len(parts) == 1:
        return parts[0]
    return TopLogprobs(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "logprobs", "own"))
    )


def top_labels(
    ids: np.ndarray, logprobs: np.ndarray, encoding: Encoding, num_classes: int, rows: int | None = None
) -> SoftLabels:
    """Build soft labels from the most likely classes; the mass outside is about 1 - sum(p).

    Args:
        ids: (N, K) int64, by descending log-probability. Ids of at least `num_classes` are padding
            of the model and count as mass outside.
        logprobs: (N, K) float64, nats, at T = 1; -inf: missing.
        rows: number of classes of the model including padding; None: unknown.
    """
    kept = np.isfinite(logprobs) & (ids < num_classes)
    mass = np.where(kept, np.exp(logprobs), 0.0)
    if isinstance(encoding, TopP):
        kept &= np.cumsum(mass, -1) - mass < encoding.p
        mass = np.where(kept, mass, 0.0)
    counts = kept.sum(-1)
    with np.errstate(divide="ignore"):  # no class is outside
        most = np.log(np.maximum((rows or 0) - counts, 0)) + logprobs[:, -1]
    is_known = kept.all(-1) & (rows is not None)  # else more likely classes may be outside
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
    """Return the part of an answer that is stored to compare later answers with."""
    ids, logprobs, own = (getattr(found, name)[:_MOST_POSITIONS] for name in ("ids", "logprobs", "own"))
    logprobs, own = (np.round(np.maximum(each, _ZERO), 6).tolist() for each in (logprobs, own))
    return FirstAnswer(
        tuple(row.input_ids.tolist()), tuple(map(tuple, ids.tolist())), tuple(map(tuple, logprobs)), tuple(own)
    )


def kept_answer(answer: FirstAnswer) -> TopLogprobs:
    """Convert a stored answer back to predictions."""
    return TopLogprobs(
        np.asarray(answer.top_ids, dtype=np.int64),
        np.asarray(answer.top_logprobs, dtype=np.float64),
        np.asarray(answer.own_logprobs, dtype=np.float64),
    )


def difference(one: TopLogprobs, other: TopLogprobs) -> tuple[float, float]:
    """Return the mean and the largest difference of the log-probabilities in both answers, in nats.

    Positions of only one answer and tiny probabilities are ignored. The difference is infinite if
    the answers have no common class at a position.
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
    """Return `difference` in nats, to log-probabilities of all classes.

    Args:
        local: (N, V) float.
    """
    num_classes = local.shape[-1]
    found = np.take_along_axis(local, np.where(served.ids < num_classes, served.ids, 0), -1)
    apart = np.abs(served.logprobs - found)[(served.logprobs > _LEAST) & (served.ids < num_classes)]
    return float(apart.mean()), float(apart.max())


def check_alike(url: str, found: TopLogprobs, expected: TopLogprobs, whom: str, what: str) -> None:
    """Compare the answers to one row, and warn about a small difference.

    Args:
        whom: source of the expected answer, for messages.
        what: explanation for the error message.

    Raises:
        ServerError: the answers are not those of one model.
    """
    mean, worst = difference(expected, found)
    if not mean <= CLOSE:
        raise ServerError(
            f"{url}: its log-probabilities of one row differ from those of {whom} by {mean:.2g} nats in the mean (expected at most {CLOSE:g}): {what}"
        )
    if worst > SAME:
        logger.warning(
            "%s: its log-probabilities of one row differ from those of %s by up to %.2g nats: repeated captures will differ as much",
            url,
            whom,
            worst,
        )
