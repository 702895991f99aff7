"""A teacher behind a server: prompts of token ids in, top log-probabilities out."""

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
from pipeline.capture.teachers.protocol import Keep
from pipeline.capture.teachers.tops import (
    CLOSE,
    check_alike,
    difference_to_logprobs,
    first_answer,
    join,
    kept_answer,
    top_labels,
)
from pipeline.errors import MisuseError, ModelError, ServerError
from pipeline.models import load_model
from pipeline.models.load import load_config, longest_of
from pipeline.records import (
    Encoding,
    ModelInfo,
    ServerInfo,
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
from pipeline.softlabels.ragged import empty
from pipeline.tasks import Task

logger = logging.getLogger(__name__)

#: Error of the mass 1 - sum(p): log-probabilities are float32, and so is the log-sum-exp over all
#: classes.
RESIDUAL_ERROR = 1e-5
#: Parts of the servers' messages for a row that is longer than their context.
_TOO_LONG = ("context length", "max_model_len", "longer than", "maximum allowed length")


class ServedTeacher:
    """A teacher behind one or several servers; see `Teacher` for the members."""

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
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Initialize the teacher without sending a request.

        Args:
            name: directory or Hub name of the tokenizer. A model configuration there gives the
                number of classes.
            revision: of the configuration.
            top_logprobs: K, the number of classes requested per position.
            check_with: local weights to compare predictions with before the first shard.

        Raises:
            MisuseError: the classes of the task are not tokens.
        """
        if not task.continues_prompts:
            raise MisuseError(
                f"--server: {task.name} has classes that are not tokens, and a server gives probabilities of tokens; capture with local weights, without --server"
            )
        self.tokenizer = tokenizer
        self._task, self._client, self._described, self._check_with = task, client, described, check_with
        self._top, self._largest = top_logprobs, 0
        config = _config(name, revision, trust_remote_code)
        self._rows = None if config is None else int(config.get_text_config().vocab_size)
        self.embedding_rows = len(tokenizer) if self._rows is None else self._rows
        self.num_classes = min(self.embedding_rows, len(tokenizer))
        longest = int(tokenizer.model_max_length) if config is None else longest_of(config, tokenizer)
        self.longest_input = min(longest, described.longest or longest)

    @property
    def name(self) -> str:
        """Name for messages."""
        return self._described.public_name

    @property
    def label_names(self) -> None:
        """None: classes are tokens."""

    @property
    def info(self) -> ModelInfo:
        """Name of the served model, and the server's settings.

        It excludes the address, which may change.
        """
        found = self._described
        server = ServerInfo(found.api, found.version, self._top, RESIDUAL_ERROR, dict(found.settings))
        dtype = found.settings.get("dtype", "unknown").removeprefix("torch.")
        return ModelInfo(
            self.name, None, "unknown", "unknown", 0, dtype, None, found.settings.get("quantization"), server=server
        )

    @property
    def device(self) -> str:
        """Name and version of the server's software."""
        return f"{self._described.api} {self._described.version}"

    @property
    def output_matrix(self) -> None:
        """None: the output matrix is on the server."""

    @property
    def busy(self) -> bool:
        """Whether enough requests are queued to keep the server busy during one more batch."""
        return self._client.waiting >= max(self._client.concurrency, self._largest)

    def describe(self, info: ModelInfo) -> str:
        """Return the model, software and addresses."""
        return f"{self.name} behind {', '.join(self._client.urls)}: {self.device}, the top {self._top} log-probabilities of each position"

    def settle(self, tokenization: Tokenization) -> Tokenization:
        """Return the tokenization unchanged."""
        return tokenization

    def check(self, encoding: Encoding, tokenization: Tokenization, *, store_entropy: bool) -> None:
        """Refuse what a server cannot give: it has the most likely classes only, at temperature 1.

        Raises:
            MisuseError: the message names an alternative.
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
                f"--store-entropy: the most likely classes do not give the entropy over all; leave it out, {local}"
            )

    def fastest_batch_tokens(self, tokenization: Tokenization) -> int:
        """Refuse `--auto-batch-tokens`: the server makes its own batches.

        Raises:
            MisuseError: always.
        """
        raise MisuseError(
            "--auto-batch-tokens: a server makes its own batches; --concurrency says how many rows are asked at once"
        )

    def close(self) -> None:
        """Cancel pending requests and close the connections."""
        self._client.close()

    # --------------------------------------------------------------------------- the predictions

    def begin(self, rows: Sequence[TokenizedExample], length: int | None, encoding: Encoding) -> _Asked:
        """Send the requests of every row; each isolated document is a prompt of its own."""
        futures = [self.ask(row) for row in rows]
        self._largest = max(self._largest, sum(map(len, futures)))
        return _Asked(self, rows, encoding, futures)

    def ask(self, row: TokenizedExample, url: str | None = None) -> list[Future[TopLogprobs]]:
        """Send the requests of one row.

        Args:
            url: server to use; default: the least busy one.
        """
        assert row.supervised is not None
        lengths = [row.num_tokens] if row.document_lengths is None else row.document_lengths.tolist()
        found, start = [], 0
        for length in lengths:
            positions = np.flatnonzero(row.supervised[start : start + length])
            if len(positions):
                ids = row.input_ids[start : start + length].tolist()
                what = f"row {row.source_row}"
                described = self._described
                for each in requests_for(described.api, described.model, ids, positions, self._top, self._rows):
                    found.append(
                        self._client.submit(each.path, each.body, each.read, what=what, size=each.size, url=url)
                    )
            start += length
        return found

    def labelled(
        self, rows: Sequence[TokenizedExample], found: Sequence[TopLogprobs | str], encoding: Encoding
    ) -> Labelled:
        """Build the soft labels and scores of a batch.

        Args:
            found: per row, its predictions, or the reason why there are none.
        """
        bad = {i: each for i, each in enumerate(found) if isinstance(each, str)}
        tops = [each for each in found if not isinstance(each, str)]
        if not tops:
            return Labelled(empty(encoding, self.num_classes), TeacherScores(torch.zeros(0), torch.zeros(0)), bad)
        ids, logprobs, own = (
            np.concatenate([getattr(top, name) for top in tops]) for name in ("ids", "logprobs", "own")
        )
        soft = top_labels(ids, logprobs, encoding, self.num_classes, self._rows)
        scores = TeacherScores(torch.from_numpy(-own).float(), torch.full((len(own),), torch.nan))
        return Labelled(soft, scores, bad)

    def refused(self, error: RefusedError) -> str:
        """Return why a row has no soft labels, for reports.

        The text excludes the server's address, which is logged only.

        Raises:
            ServerError: the server refuses the settings, not the row.
        """
        if self._asks_too_much(error):
            raise self.unusable(error)
        logger.warning("%s", error)
        return error.reason + self._advice(error)

    def unusable(self, error: RefusedError) -> ServerError:
        """Return the error that ends the capture, with the flag that solves it."""
        return ServerError(f"{error}{self._advice(error)}")

    def _asks_too_much(self, error: RefusedError) -> bool:
        lower = error.reason.lower()  # excludes the address
        return "logprobs" in lower and self._described.api == "vllm" and ("max" in lower or "greater" in lower)

    def _advice(self, error: RefusedError) -> str:
        lower = str(error).lower()
        if self._asks_too_much(error):
            return f"; start vLLM with --max-logprobs {self._top}, or ask for fewer with --top-k"
        if any(each in lower for each in _TOO_LONG):
            return "; start the server with a longer context, or use a smaller --max-length"
        if "memory" in lower or "while others" in lower:
            flag = "--max-num-batched-tokens" if self._described.api == "vllm" else "--chunked-prefill-size"
            return f"; where the server runs out of memory for log-probabilities, start it with a smaller {flag}"
        return ""

    # -------------------------------------------------------------------------------- the checks

    def compare(self, rows: Sequence[TokenizedExample], encoding: Encoding, keep: Keep | None = None) -> None:
        """Request one short row twice, and from every server, and compare the answers.

        The answers are also compared with the first one of the capture, and with local weights if
        `check_with` is set.

        Raises:
            ServerError: the row is refused, or the answers are not those of one model.
            ModelError: the answers differ from those of the local weights.
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
                raise self.unusable(error) from None
        first = answers[0][1]
        for url, answer in answers[1:]:
            whom = "the same row again" if url == urls[0] else f"{urls[0]}"
            check_alike(url, answer, first, whom, "do all servers run one model in one precision?")
        noted = None if keep is None else keep(first_answer(row, first))
        if noted is not None and noted.input_ids == tuple(row.input_ids.tolist()):
            what = "another model, or other settings; continue with the earlier server, or start again with --overwrite"
            check_alike(urls[0], first, kept_answer(noted), "the server that this capture began with", what)
        if self._check_with is not None:
            self._compare_with(self._check_with, row, first)

    def _compare_with(self, path: str, row: TokenizedExample, served: TopLogprobs) -> None:
        from pipeline.capture.forward import teacher_logits

        loaded = load_model(self._task, path)
        logits = teacher_logits(self._task, loaded, self.tokenizer, [row], self.num_classes)
        mean, worst = difference_to_logprobs(served, torch.log_softmax(logits.float(), -1).cpu().numpy())
        if not mean <= CLOSE:
            raise ModelError(
                f"--check-with {path}: the server's log-probabilities of one row differ from these weights by {mean:.2g} nats in the mean (expected at most {CLOSE:g}): {self.name} is another model, or reads other token ids"
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
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ServedTeacher:
    """Connect to servers and return a teacher for the model that they serve.

    Args:
        name: directory or Hub name of the tokenizer and of the model's configuration.
        servers: addresses such as http://host:8000/v1.
        revision: of the configuration.

    Raises:
        ServerError: see `describe`.
        MisuseError: an invalid address, or a task whose classes are not tokens.
    """
    client = Client(base_urls(servers), key=server_key(), concurrency=concurrency, patience=patience)
    try:
        described = describe(client, api=api, model=model)
        return ServedTeacher(
            task,
            name,
            tokenizer,
            client,
            described,
            top_logprobs=top_logprobs,
            check_with=check_with,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    except BaseException:
        client.close()
        raise


@dataclass(frozen=True, slots=True)
class _Asked:
    """A batch whose requests are sent."""

    teacher: ServedTeacher
    rows: Sequence[TokenizedExample]
    encoding: Encoding
    futures: Sequence[Sequence[Future[TopLogprobs]]]

    def result(self) -> Labelled:
        """Wait for the answers; a row that the server refuses becomes a bad row."""
        found: list[TopLogprobs | str] = []
        for futures in self.futures:
            try:
                found.append(join([future.result() for future in futures]))
            except RefusedError as error:
                found.append(self.teacher.refused(error))
        return self.teacher.labelled(self.rows, found, self.encoding)


def _config(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    try:
        return load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    except ModelError as error:
        logger.warning("%s; the number of classes and the longest row are those of the tokenizer", error)
        return None
