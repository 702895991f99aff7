"""Generation through a stand-in server on loopback that answers as vLLM does."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pytest
import torch

from pipeline.errors import BadRowError, ContractError, MisuseError, ServerError
from pipeline.generation.agreement import same_text
from pipeline.generation.draws import SeededDraws, stream_key
from pipeline.generation.records import Asked, Prompt, Sampling
from pipeline.generation.run import run
from pipeline.generation.served import served_writer
from pipeline.servers import pool
from tests.support.chats import tokenizer_of
from tests.support.generations import config, writing_model  # noqa: F401 - a fixture

#: The values that the stand-in applies for fields missing in a request, as servers do.
DEFAULTS = {"top_p": 0.3, "top_k": 1, "min_p": 0.5, "repetition_penalty": 1.7}


class StandIn:
    """A completion server of a tiny model; each request's seed selects its random stream."""

    def __init__(
        self,
        model,
        tokenizer,
        *,
        owner="vllm",
        takes_ids=True,
        names=("tiny",),
        defaults=DEFAULTS,
        refuses=(),
        says=None,
    ):
        self.defaults = {} if owner == "library" else defaults
        self.refuses, self.says = refuses, says
        self.model, self.tokenizer, self.owner, self.takes_ids, self.names = model, tokenizer, owner, takes_ids, names
        self.asked: list[dict] = []
        self.faults: list[int] = []
        self.lock = threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                listed = [{"id": name, "owned_by": stand_in.owner, "max_model_len": 60} for name in stand_in.names]
                self.answer(200, {"data": listed})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stand_in.lock:
                    if stand_in.faults:
                        self.answer(stand_in.faults.pop(), {"error": {"message": "busy"}})
                        return
                    self.answer(*stand_in.complete(body))

            def answer(self, status, body):
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def complete(self, body):
        self.asked.append(body)
        prompt = body["prompt"]
        if isinstance(prompt, list) and not self.takes_ids:
            return 422, {"error": {"message": "prompt: expected a string"}}
        if isinstance(prompt, str) and "forbidden" in prompt:
            return 400, {"error": {"message": "no such prompts"}}
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"]
        for name in self.refuses:
            if name in body:
                return 400, {"error": {"message": f"unknown field `{name}`"}}
        limit = {name: body.get(name, self.defaults.get(name)) for name in ("top_p", "top_k", "min_p")}
        limit = {name: value if value and value > 0 else None for name, value in limit.items()}
        penalty = body.get("repetition_penalty", self.defaults.get("repetition_penalty", 1.0))
        sampling = Sampling(1, body["max_tokens"], body["temperature"], stop=(), seed=0, **limit)
        keys = torch.tensor([body.get("seed", 0)])
        draws, drawn, reason = SeededDraws(sampling, keys, len(self.tokenizer)), [], "length"
        ends = {*self.model.generation_config.eos_token_id, *body.get("stop_token_ids", ())}
        for _ in range(body["max_tokens"]):
            with torch.inference_mode():
                logits = self.model(torch.tensor([[*ids, *drawn]])).logits[:, -1]
                seen = list({*ids, *drawn})
                logits[:, seen] = torch.where(logits[:, seen] > 0, logits[:, seen] / penalty, logits[:, seen] * penalty)
            drawn.append(int(draws(None, logits).argmax()))
            if drawn[-1] in ends:
                reason = "stop"
                break
        logprobs = [float(each[0]) for each in draws.logprobs]
        text = self.tokenizer.decode(drawn, skip_special_tokens=True)
        choice = {"text": text, "finish_reason": reason, "logprobs": {"token_logprobs": logprobs}}
        if self.owner == "vllm":
            choice |= {"stop_reason": None}
            if body.get("return_token_ids"):
                choice |= {"token_ids": drawn}
        if self.says is not None:
            choice |= self.says(choice, drawn)
        return 200, {"choices": [choice]}


@pytest.fixture
def serve(lm_tokenizer):
    started = []

    def make(**settings):
        started.append(StandIn(writing_model(len(lm_tokenizer)), lm_tokenizer, **settings))
        return started[-1]

    yield make
    for each in started:
        each.http.shutdown()
        each.http.server_close()


def rows_of(found):
    return datasets.load_dataset(str(found.root), split="train").to_list()


def test_ids_seeds_and_log_probabilities_go_both_ways(config, serve, lm_tokenizer):
    server = serve()
    found = run(config(server=(server.url,), temperature=0.8, top_k=40, rows="0:6"))
    rows = rows_of(found)
    assert len(rows) == 12
    assert found.end.contract.model.name == "tiny"
    assert found.end.contract.model.api == "vllm"
    prompts = {tuple(request["prompt"]): request for request in server.asked}
    for row in rows:
        written = row["input_ids"][row["prompt_tokens"] :]
        assert tuple(row["input_ids"][: row["prompt_tokens"]]) in prompts
        assert row["ids_from"] == "server"
        assert row["finish_reason"] == ("eos" if written[-1] in found.end.contract.end_ids else "length")
        assert row["completion"] == lm_tokenizer.decode(written, skip_special_tokens=True)
        ids = torch.tensor([row["input_ids"]])
        with torch.inference_mode():
            plain = torch.log_softmax(server.model(ids).logits[0, :-1].double(), -1)
        each = plain.gather(1, ids[0, 1:, None])[row["prompt_tokens"] - 1 :, 0]
        assert row["logprob"] == pytest.approx(float(each.sum()), rel=1e-5)
    seeds = [request["seed"] for request in server.asked if "seed" in request]
    assert {stream_key(0, "train", row, sample) % 2**31 for row in range(6) for sample in range(2)} <= set(seeds)
    assert {request["top_k"] for request in server.asked if "top_k" in request} == {40}


@pytest.mark.full
def test_two_servers_share_the_requests_and_faults_change_nothing(config, serve, monkeypatch):
    monkeypatch.setattr(pool, "FIRST_WAIT", 0.001)  # a failing server is paused
    monkeypatch.setattr(pool, "LAST_WAIT", 0.001)
    one, two = serve(), serve()
    two.faults = [500, 503, 429]
    found = run(config("two", server=(one.url, two.url), rows="0:6", concurrency=3))
    assert one.asked
    assert two.asked
    alone = run(config("one", server=(serve().url,), rows="0:6"))
    assert [row["input_ids"] for row in rows_of(found)] == [row["input_ids"] for row in rows_of(alone)]


def test_a_server_that_takes_text_alone(config, serve, lm_tokenizer, caplog):
    """Token ids come from the tokenizer, with EOS where the server reports a natural end.

    Log-probabilities are stored only at temperature 1, where they are the model's own.
    """
    server = serve(owner="library", takes_ids=False)
    found = run(config("a", server=(server.url,), rows="0:6"))
    assert "takes prompts as text only" in caplog.text
    for row in rows_of(found):
        written = row["input_ids"][row["prompt_tokens"] :]
        assert row["ids_from"] == "tokenizer"
        assert row["logprob"] < 0
        body = written[:-1] if row["finish_reason"] == "eos" and written[-1] == 1 else written
        assert body == lm_tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        if row["finish_reason"] == "eos":
            assert written[-1] in found.end.contract.end_ids
    warm = run(config("b", server=(server.url,), rows="0:6", temperature=0.7))
    assert {row["logprob"] for row in rows_of(warm)} == {None}


def test_what_a_server_refuses_is_a_bad_row(config, serve, tmp_path):
    server = serve(owner="library", takes_ids=False)
    (tmp_path / "p.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "forbidden"}\n')
    settings = {"server": (server.url,), "dataset": str(tmp_path / "p.jsonl")}
    with pytest.raises(
        BadRowError, match=r"row 1: the server refuses the prompt: .*400 no such prompts; correct the row"
    ):
        run(config(**settings))
    found = run(config("skip", on_bad_row="skip", **settings))
    assert (found.counts.completions, found.counts.rows_set_aside) == (2, 1)


def test_which_model_and_no_server_are_lines(config, serve, tmp_path):
    several = serve(names=("a", "b"))
    with pytest.raises(MisuseError, match="serves a, b; name one with --server-model"):
        run(config(server=(several.url,)))
    with pytest.raises(MisuseError, match="--server-model c: expected one that it serves, a, b"):
        run(config(server=(several.url,), server_model="c"))
    assert run(config(server=(several.url,), server_model="b", rows="0:2")).end.contract.model.name == "b"
    with pytest.raises(ContractError, match="holds another generation"):
        run(config(server=(several.url,), server_model="a", rows="0:2"))
    with pytest.raises(MisuseError, match="expected an address as http://host:8000/v1"):
        run(config("other", server=("localhost",)))
    with pytest.raises(ServerError, match="cannot be reached"):
        run(config("other", server=("http://127.0.0.1:9/v1",), server_patience=0.5))


def test_a_prompt_longer_than_the_server_takes_is_known_before(config, serve):
    server = serve()
    with pytest.raises(BadRowError, match="are more than the model takes, 60"):
        run(config(server=(server.url,), max_new_tokens=60))
    assert not [request for request in server.asked if "seed" in request]


def test_a_tokenizer_of_another_model_is_known_by_its_text(lm_tokenizer, bert_tokenizer):
    ids = lm_tokenizer("the cat sat")["input_ids"]
    assert same_text(lm_tokenizer, ids, "the cat sat")
    assert same_text(lm_tokenizer, [*ids, 1], " the cat sat")
    assert not same_text(bert_tokenizer, [i for i in ids if i < len(bert_tokenizer)], "the cat sat")
    assert not same_text(lm_tokenizer, [len(lm_tokenizer)], "the")
    assert same_text(lm_tokenizer, lm_tokenizer("é")["input_ids"][:1], "\ufffd")


def test_a_server_of_another_model_is_refused(config, serve):
    server = serve()
    whole = server.complete

    def complete(body):
        status, answer = whole(body)
        return status, {"choices": [answer["choices"][0] | {"text": "something else", "token_ids": [260, 261, 262]}]}

    server.complete = complete
    with pytest.raises(MisuseError, match="its tokenizer decodes token ids of the server's model tiny to another text"):
        run(config(server=(server.url,)))


def test_no_path_of_the_servers_machine_is_written(config, serve):
    found = run(config(server=(serve(names=("/home/someone/models/tiny",)).url,), rows="0:2"))
    assert found.end.contract.model.name == "tiny"
    assert not [path for path in found.root.rglob("*.*") if path.is_file() and b"/home/" in path.read_bytes()]


def written(found):
    return [row["input_ids"][row["prompt_tokens"] :] for row in rows_of(found)]


def test_a_server_applies_no_setting_that_nobody_asked_for(config, serve):
    """Requests set neutral values, so that the server's defaults change nothing."""
    plain = run(config("plain", server=(serve(defaults={}).url,), rows="0:4"))
    server = serve()
    found = run(config("found", server=(server.url,), rows="0:4"))
    assert written(found) == written(plain)
    assert all(body["presence_penalty"] == body["frequency_penalty"] == 0 for body in server.asked)
    assert found.end.contract.model.own_settings == ()


def test_a_setting_that_a_server_refuses_is_said_and_stands_in_the_card(config, serve, caplog):
    server = serve(refuses=("min_p", "frequency_penalty"))
    found = run(config(server=(server.url,), rows="0:2"))
    assert "does not accept min_p, frequency_penalty: it uses its own" in caplog.text
    assert found.end.contract.model.own_settings == ("min_p", "frequency_penalty")
    assert "| `min_p, frequency_penalty` |" in (found.root / "README.md").read_text()
    with pytest.raises(MisuseError, match=r"--min-p 0.2: the server \(vllm\) does not take it"):
        run(config("other", server=(server.url,), rows="0:2", min_p=0.2))
    with pytest.raises(MisuseError, match=r"--top-k 5: the server \(ollama\) does not take it; leave it out"):
        run(config("other", server=(serve(owner="library").url,), rows="0:2", top_k=5))


@pytest.mark.parametrize("reason", ["abort", "content_filter", "repetition", None])
def test_what_is_no_end_of_the_model_is_never_learnt_as_one(config, serve, reason, monkeypatch):
    monkeypatch.setattr("pipeline.servers.pool.FIRST_WAIT", 0.001)
    server = serve(says=lambda choice, drawn: {"finish_reason": reason})
    with pytest.raises(BadRowError, match=f"expected the finish reason stop or length, found {reason!r}"):
        run(config(server=(server.url,), rows="0:1"))


def served(tokenizer, *, stated=None, says=None, **sampling):
    """A function that converts a server's choice to a completion, without a real server."""
    settings = Sampling(1, 9, 1.0, None, None, None, sampling.pop("stop", ()), 0)
    return lambda choice, *, api="openai", chat=False: _completion(tokenizer, settings, stated, choice, api, chat)


def _completion(tokenizer, sampling, stated, choice, api, chat):
    class Answers:
        urls = ("http://one",)

        def get(self, path, url=None):
            return {"data": [{"id": "m", "owned_by": api}]} if path == "/v1/models" else None

        def submit(self, *_, **__):
            done = Future()
            done.set_result({})
            return done

    writer = served_writer(Answers(), tokenizer, model=None, sampling=sampling, stated_ends=stated)
    prompt = Prompt(0, "a", np.asarray(tokenizer("a")["input_ids"], dtype=np.int32), is_chat=chat)
    return writer._completion({"choices": [choice]}, Asked(prompt, "train", 0), sampling)


def test_the_end_token_is_that_of_the_models_turn_or_none():
    gemma = tokenizer_of("gemma-3")
    eos, turn = gemma.eos_token_id, gemma.convert_tokens_to_ids("<end_of_turn>")
    assert eos != turn
    choice = {"text": "the cat", "finish_reason": "stop"}
    ids = gemma("the cat", add_special_tokens=False)["input_ids"]
    for stated, chat, end, reason in (
        (None, True, turn, "eos"),
        ([eos, turn], True, turn, "eos"),
        (None, False, eos, "eos"),
        ([turn], False, turn, "eos"),
        ([turn, 7], False, None, "stop"),
    ):
        found = served(gemma, stated=stated)(choice, chat=chat)
        assert found.finish_reason == reason
        assert found.token_ids.tolist() == [*ids, *([] if end is None else [end])]
    for api, key in (("vllm", "stop_reason"), ("sglang", "matched_stop")):
        said = served(gemma, stated=[eos, turn], stop=("z",))({**choice, key: turn}, api=api)
        assert (said.finish_reason, said.token_ids[-1]) == ("eos", turn)
    assert served(gemma, stop=("z",))(choice).finish_reason == "stop"
    assert served(gemma)({**choice, "finish_reason": "eos_token"}).finish_reason == "eos"


def test_a_stop_that_is_a_special_token_ends_a_served_completion(config, serve, lm_tokenizer, caplog):
    stop = next(t.content for i, t in lm_tokenizer.added_tokens_decoder.items() if t.special and i != 1)
    server = serve()
    found = run(config(server=(server.url,), stop=(stop,), rows="0:2"))
    token = lm_tokenizer.convert_tokens_to_ids(stop)
    assert token in found.end.contract.end_ids
    assert {tuple(body["stop_token_ids"]) for body in server.asked if "seed" in body} == {(token,)}
