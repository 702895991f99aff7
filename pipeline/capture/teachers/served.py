"""A teacher behind a server: rows are prompts of token ids, soft labels are top log-probabilities."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from pipeline.capture.teachers.predictions import Labelled
from pipeline.errors import MisuseError, ModelError, ServerError
from pipeline.models import load_model
from pipeline.models.load import load_config, longest_of
from pipeline.records import (
    Encoding,
    ModelInfo,
    ServerInfo,
    SoftLabels,
    TeacherScores,
    Tokenization,
    TokenizedExample,
    TopK,
    TopP,
)
from pipeline.servers.addresses import base_urls, server_key
from pipeline.servers.answers import RefusedError
from pipeline.servers.client import Client
from pipeline.servers.described import Api, Described, describe
from pipeline.servers.scoring import TopLogprobs, requests_for
from pipeline.softlabels.ragged import empty, offsets_of
from pipeline.tasks import Task

logger = logging.getLogger(__name__)

#: Mass: what float32 log-probabilities, and the log-sum-exp over all classes behind them, leave open
#: of 1 - sum(p).
RESIDUAL_ERROR = 1e-5
#: Nats by which two answers to one row may differ: without a warning, and at all. The second is what
#: a server in half precision explains.
_SAME, _ALIKE = 1e-3, 0.5
#: Mean nats by which a server may differ from local weights of the same model.
_CLOSE = 0.1
#: Log-probabilities below this are not compared.
_LEAST = -10.0


class ServedTeacher:
    """A model behind one or several servers; the protocol says what each member is."""

    embedding_rows: int
    num_classes: int

    def __init__(
        self,
        task: Task,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        client: Client,
        described: Described,
        *,
        top_logprobs: int,
        check_with: str | None = None,
    ) -> None:
        """Ask nothing yet.

        Args:
            name: directory or hub name of the tokenizer; where there is a configuration beside it, it says how many classes there are.
            top_logprobs: K, classes that are asked of each position.
            check_with: local weights that predictions are compared with before the first shard.

        Raises:
            MisuseError: a task whose classes are no tokens.
        """
        if not task.classes_are_tokens:
            raise MisuseError(
                f"--server: {task.name} has classes that are no tokens, and a server gives probabilities of tokens; capture with local weights, without --server"
            )
        self.tokenizer = tokenizer
        self._task, self._client, self._described, self._check_with = task, client, described, check_with
        self._top, self._largest = top_logprobs, 0
        config = _config(name)
        rows = len(tokenizer) if config is None else int(config.get_text_config().vocab_size)
        self.embedding_rows = max(rows, len(tokenizer)) if config is None else rows
        self.num_classes = min(rows, len(tokenizer))
        longest = int(tokenizer.model_max_length) if config is None else longest_of(config, tokenizer)
        self.longest_input = min(longest, described.longest or longest)

    @property
    def name(self) -> str:
        """As messages name it."""
        return self._described.public_name

    @property
    def label_names(self) -> None:
        """Classes are tokens."""

    @property
    def info(self) -> ModelInfo:
        """The served model's name, and what the server says of it; no address, which may change."""
        found = self._described
        server = ServerInfo(found.api, found.version, self._top, RESIDUAL_ERROR, dict(found.settings))
        dtype = found.settings.get("dtype", "unknown").removeprefix("torch.")
        return ModelInfo(
            self.name, None, "unknown", "unknown", 0, dtype, None, found.settings.get("quantization"), server=server
        )

    @property
    def device(self) -> str:
        """The server's software."""
        return f"{self._described.api} {self._described.version}"

    @property
    def output_matrix(self) -> None:
        """It is not here."""

    @property
    def busy(self) -> bool:
        """Whether a batch waits beside the one that is awaited, and as much as may be in flight."""
        return self._client.waiting >= max(self._client.concurrency, self._largest)

    def describe(self, info: ModelInfo) -> str:
        """Model, software and addresses."""
        return f"{self.name} behind {', '.join(self._client.urls)}: {self.device}, the top {self._top} log-probabilities of each position"

    def settle(self, tokenization: Tokenization) -> Tokenization:
        """As it is."""
        return tokenization

    def check(self, encoding: Encoding, tokenization: Tokenization, *, store_entropy: bool) -> None:
        """Servers give the most likely classes at temperature 1, and nothing of the others.

        Raises:
            MisuseError: says how to get it otherwise.
        """
        local = "or capture with local weights, without --server"
        if not isinstance(encoding, TopK | TopP):
            raise MisuseError(
                f"--encoding {encoding.kind}: a server gives the most likely classes only; use --encoding top-k with --top-k, {local}"
            )
        if encoding.temperatures != (1.0,):
            found = ", ".join(f"{t:g}" for t in encoding.temperatures)
            raise MisuseError(
                f"--temperature {found}: a server gives the mass outside the top at temperature 1 only; use --temperature 1, {local}"
            )
        if isinstance(encoding, TopK) and encoding.k > self.num_classes:
            raise MisuseError(f"--top-k {encoding.k}: expected at most the {self.num_classes} classes, found more")
        if store_entropy:
            raise MisuseError(
                f"--store-entropy: the entropy over all classes cannot be had from the most likely ones; leave it out, {local}"
            )

    def fastest_batch_tokens(self, tokenization: Tokenization) -> int:
        """The server batches by itself.

        Raises:
            MisuseError: always.
        """
        raise MisuseError(
            "--auto-batch-tokens: a server makes its own batches; --concurrency says how many rows are asked at once"
        )

    def close(self) -> None:
        """Give up what is not answered yet."""
        self._client.close()

    # --------------------------------------------------------------------------- the predictions

    def begin(self, rows: Sequence[TokenizedExample], length: int | None, encoding: Encoding) -> _Asked:
        """Ask for every row; isolated documents of a packed row are prompts of their own."""
        futures = [self.ask(row) for row in rows]
        self._largest = max(self._largest, sum(map(len, futures)))
        return _Asked(self, rows, encoding, futures)

    def ask(self, row: TokenizedExample, url: str | None = None) -> list[Future[TopLogprobs]]:
        """Send the requests of one row.

        Args:
            url: to which server; default: the least busy.
        """
        assert row.supervised is not None
        lengths = [row.num_tokens] if row.document_lengths is None else row.document_lengths.tolist()
        found, start = [], 0
        for length in lengths:
            positions = np.flatnonzero(row.supervised[start : start + length])
            if len(positions):
                ids = row.input_ids[start : start + length].tolist()
                what = f"row {row.source_row}"
                for each in requests_for(self._described.api, self._described.model, ids, positions, self._top):
                    found.append(
                        self._client.submit(each.path, each.body, each.read, what=what, size=each.size, url=url)
                    )
            start += length
        return found

    def labelled(
        self, rows: Sequence[TokenizedExample], found: Sequence[TopLogprobs | str], encoding: Encoding
    ) -> Labelled:
        """Soft labels and scores of a batch.

        Args:
            found: of each row its predictions, or why there are none.
        """
        bad = {i: each for i, each in enumerate(found) if isinstance(each, str)}
        tops = [each for each in found if not isinstance(each, str)]
        if not tops:
            return Labelled(empty(encoding, self.num_classes), TeacherScores(torch.zeros(0), torch.zeros(0)), bad)
        ids, logprobs, own = (
            np.concatenate([getattr(top, name) for top in tops]) for name in ("ids", "logprobs", "own")
        )
        soft = top_labels(ids, logprobs, encoding, self.num_classes)
        scores = TeacherScores(torch.from_numpy(-own).float(), torch.full((len(own),), torch.nan))
        return Labelled(soft, scores, bad)

    def refusal(self, error: RefusedError) -> str:
        """What a refusal means, with the flag that changes it."""
        text = str(error)
        lower = text.lower()
        if "logprobs" in lower and self._described.api == "vllm" and ("max" in lower or "greater" in lower):
            return f"{text}; start vLLM with --max-logprobs {self._top}, or ask for fewer with --top-k"
        if "context length" in lower or "max_model_len" in lower or "longer than" in lower:
            return f"{text}; start the server with a longer context, or use a smaller --max-length"
        if "memory" in lower or "asked" in lower:
            flag = "--max-num-batched-tokens" if self._described.api == "vllm" else "--chunked-prefill-size"
            return f"{text}; where the server runs out of memory for log-probabilities, start it with a smaller {flag}"
        return text

    # -------------------------------------------------------------------------------- the checks

    def compare(self, rows: Sequence[TokenizedExample], encoding: Encoding) -> None:
        """Ask one short row twice, and of every server, and compare the answers.

        With `check_with` they are compared with local weights too.

        Raises:
            ServerError: the row is refused, or the answers are not of one model.
            ModelError: the local weights say something else.
        """
        if not rows:
            return
        row = min(rows, key=lambda each: each.num_tokens)
        urls = self._client.urls
        asked = [(url, self.ask(row, url)) for url in (urls[0], *urls)]
        answers = []
        for url, futures in asked:
            try:
                answers.append((url, join([future.result() for future in futures])))
            except RefusedError as error:
                raise ServerError(self.refusal(error)) from None
        for url, answer in answers[1:]:
            worst = _difference(answers[0][1], answer)
            whom = "the same row again" if url == urls[0] else f"{urls[0]}"
            if worst > _ALIKE:
                raise ServerError(
                    f"{url}: its log-probabilities of one row differ from those of {whom} by {worst:.2g} nats (expected at most {_ALIKE:g}); is it one model in one precision?"
                )
            if worst > _SAME:
                logger.warning(
                    "%s: its log-probabilities of one row differ from those of %s by up to %.2g nats: a capture that is made again will differ as much",
                    url,
                    whom,
                    worst,
                )
        if self._check_with is not None:
            self._compare_with(self._check_with, row, answers[0][1])

    def _compare_with(self, path: str, row: TokenizedExample, served: TopLogprobs) -> None:
        from pipeline.capture.forward import teacher_logits

        loaded = load_model(self._task, path)
        logits = teacher_logits(self._task, loaded, self.tokenizer, [row], self.num_classes)
        local = torch.log_softmax(logits.float(), -1).cpu().numpy()
        inside = np.where(served.ids < self.num_classes, served.ids, 0)
        found = np.take_along_axis(local, inside, -1)
        seen = (served.logprobs > _LEAST) & (served.ids < self.num_classes)
        apart = np.abs(served.logprobs - found)[seen]
        mean, worst = float(apart.mean()), float(apart.max())
        if not mean <= _CLOSE:
            raise ModelError(
                f"--check-with {path}: the server's log-probabilities of one row differ from these weights by {mean:.2g} nats in the mean (expected at most {_CLOSE:g}): {self.name} is another model, or reads other token ids"
            )
        logger.info(
            "%s: log-probabilities of one row differ from %s by %.2g nats in the mean, %.2g at most",
            self.name,
            path,
            mean,
            worst,
        )


def serve(
    task: Task,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    servers: Sequence[str],
    *,
    model: str | None = None,
    api: Api | None = None,
    concurrency: int | None = None,
    patience: float = 600.0,
    top_logprobs: int,
    check_with: str | None = None,
) -> ServedTeacher:
    """Ask servers what they serve, and make a teacher of it.

    Args:
        name: directory or hub name of the tokenizer.
        servers: addresses, as http://host:8000/v1.

    Raises:
        ServerError: see `describe`.
        MisuseError: an address that is none, or a task whose classes are no tokens.
    """
    client = Client(base_urls(servers), key=server_key(), concurrency=concurrency, patience=patience)
    try:
        described = describe(client, api=api, model=model)
        return ServedTeacher(task, name, tokenizer, client, described, top_logprobs=top_logprobs, check_with=check_with)
    except BaseException:
        client.close()
        raise


@dataclass(frozen=True, slots=True)
class _Asked:
    """A batch that is asked for."""

    teacher: ServedTeacher
    rows: Sequence[TokenizedExample]
    encoding: Encoding
    futures: Sequence[Sequence[Future[TopLogprobs]]]

    def result(self) -> Labelled:
        """Wait for the answers; a row that the server refuses is a bad row."""
        found: list[TopLogprobs | str] = []
        for futures in self.futures:
            try:
                found.append(join([future.result() for future in futures]))
            except RefusedError as error:
                found.append(self.teacher.refusal(error))
        return self.teacher.labelled(self.rows, found, self.encoding)


def join(parts: Sequence[TopLogprobs]) -> TopLogprobs:
    """The predictions of one row, from those of its parts."""
    if len(parts) == 1:
        return parts[0]
    return TopLogprobs(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "logprobs", "own"))
    )


def top_labels(ids: np.ndarray, logprobs: np.ndarray, encoding: Encoding, num_classes: int) -> SoftLabels:
    """Soft labels from the most likely classes; the mass outside is 1 - sum(p).

    Args:
        ids: (N, K) int64, by falling log-probability; ids from `num_classes` on are the model's padding, and count to the mass outside.
        logprobs: (N, K) float64, nats, at T = 1; -inf: not there.
    """
    kept = np.isfinite(logprobs) & (ids < num_classes)
    mass = np.where(kept, np.exp(logprobs), 0.0)
    if isinstance(encoding, TopP):
        kept &= np.cumsum(mass, -1) - mass < encoding.p
        mass = np.where(kept, mass, 0.0)
    counts, total = kept.sum(-1), mass.sum(-1)
    residual = np.log(np.maximum(1 - total, np.finfo(np.float64).tiny))
    residual[(total >= 1) | (counts == num_classes)] = -np.inf
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


def _difference(one: TopLogprobs, other: TopLogprobs) -> float:
    """Nats: the largest difference of a log-probability that both have, and that is not tiny."""
    worst = float(np.abs(one.own - other.own)[one.own > _LEAST].max(initial=0.0))
    for n in range(len(one.ids)):
        _, here, there = np.intersect1d(one.ids[n], other.ids[n], return_indices=True)
        if not len(here):
            return np.inf
        values = one.logprobs[n][here]
        apart = np.abs(values - other.logprobs[n][there])[values > _LEAST]
        worst = max(worst, float(apart.max(initial=0.0)))
    return worst


def _config(name: str) -> Any:
    try:
        return load_config(name)
    except ModelError:  # a tokenizer alone
        return None
