"""The model that a server serves, the server's API, and its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from pipeline.errors import ServerError
from pipeline.servers.client import Client

Api = Literal["vllm", "sglang"]

#: Settings that SGLang reports and that change predictions.
_SETTINGS = ("dtype", "quantization", "kv_cache_dtype", "attention_backend", "revision")
_MOST_TEXT = 200
#: Tokens of the context that a prompt cannot use: the generated one, and for SGLang those that its
#: scheduler reserves (its longest prompt is shorter than the context - 1 - 5).
_NOT_PROMPT: Mapping[Api, int] = {"vllm": 1, "sglang": 7}


@dataclass(frozen=True, slots=True)
class Described:
    """One model behind one or several servers."""

    api: Api
    model: str
    """Name of the model in requests."""
    version: str
    """Version of the server's software, or "unknown"."""
    longest: int | None = None
    """Number of tokens of the longest prompt, which leaves room for one more token; None:
    unknown."""
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def public_name(self) -> str:
        """The model's name without directories of the server's machine."""
        return PurePath(self.model).name if self.model.startswith("/") else self.model


def describe(client: Client, *, api: Api | None = None, model: str | None = None) -> Described:
    """Ask every server of a client for its model.

    Args:
        api: the API to use; None: detect it.
        model: name of the model; None: the only one.

    Raises:
        ServerError: a server does not answer, has another API or no such model, or the servers
            differ.
    """
    found = [_describe(client, url, api, model) for url in client.urls]
    for url, other in zip(client.urls[1:], found[1:], strict=True):
        if other != found[0]:
            raise ServerError(
                f"{url}: expected the same model and version as {client.urls[0]} ({_short(found[0])}), found {_short(other)}; give servers that are alike"
            )
    return found[0]


def _short(found: Described) -> str:
    settings = "".join(f", {name} {value}" for name, value in found.settings.items())
    return f"{found.model}, {found.api} {found.version}, prompts of {found.longest} tokens{settings}"


def _describe(client: Client, url: str, api: Api | None, model: str | None) -> Described:
    models = _models(client.get("/v1/models", url), url)
    entry = _named(models, model, url)
    owner = str(entry.get("owned_by", "")).lower()
    is_vllm = api == "vllm" or (api is None and owner == "vllm")
    info = {} if is_vllm else _mapping(client.get("/get_server_info", url) or client.get("/server_info", url))
    found = api or _api(owner, info)
    if found is None:
        raise ServerError(
            f"{url}: expected vLLM or SGLang, found {str(entry.get('owned_by') or 'another server')[:_MOST_TEXT]}; others give no log-probabilities of prompt tokens (set --server-api if the server is one of the two and does not report it)"
        )
    if found == "vllm":
        info = _mapping(client.get("/version", url))
    length = entry.get("max_model_len") or info.get("context_length")
    settings = {name: str(info[name])[:_MOST_TEXT] for name in _SETTINGS if info.get(name) not in (None, "", "auto")}
    return Described(
        api=found,
        model=str(entry["id"]),
        version=str(info.get("version") or "unknown")[:_MOST_TEXT],
        longest=max(1, length - _NOT_PROMPT[found]) if isinstance(length, int) and length > 1 else None,
        settings=settings if found == "sglang" else _root(entry),
    )


def _root(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return the name of vLLM's weights: the last part of their directory or Hub name."""
    root = entry.get("root")
    name = PurePath(root).name[:_MOST_TEXT] if isinstance(root, str) else ""
    return {"root": name} if name else {}


def _models(answer: Any, url: str) -> Sequence[Mapping[str, Any]]:
    listed = _mapping(answer).get("data")
    models = [each for each in listed if isinstance(each, dict) and each.get("id")] if isinstance(listed, list) else []
    if not models:
        raise ServerError(
            f"{url}: expected the list of its models under /v1/models, found none; give the base address of a vLLM or SGLang server, as http://host:8000/v1"
        )
    return models


def _named(models: Sequence[Mapping[str, Any]], model: str | None, url: str) -> Mapping[str, Any]:
    names = ", ".join(str(each["id"]) for each in models[:8])
    if model is None and len(models) > 1:
        raise ServerError(f"{url}: serves several models; name one with --server-model: {names}")
    for each in models:
        if model in (None, each["id"]):
            return each
    raise ServerError(f"{url}: --server-model {model}: expected one of {names}")


def _api(owner: str, info: Mapping[str, Any]) -> Api | None:
    if owner in ("vllm", "sglang"):
        return "vllm" if owner == "vllm" else "sglang"
    return "sglang" if "model_path" in info and "version" in info else None


def _mapping(answer: Any) -> Mapping[str, Any]:
    return answer if isinstance(answer, dict) else {}
