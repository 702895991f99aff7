"""A stand-in for the Hugging Face hub's HTTP API on loopback.

Supports repositories, large files, commits, trees and ranges.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from pipeline.cache.storage import transfer

TOKEN = "hf_plantedTokenOfTheTests"
LARGE = (".parquet", ".png", ".safetensors", ".bin")


class Hub:
    """State of the server, and the requests it received."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.commits: dict[str, dict[str, tuple[str, bytes]]] = {}
        """Commit -> path -> ("lfs" or "regular", content)."""
        self.objects: dict[str, bytes] = {}
        """SHA-256 -> large file."""
        self.requests: list[str] = []
        self.uploads: list[str] = []
        self.fetched = 0
        self.fail_uploads_after: int | None = None
        self.race = False
        """Whether another client commits just before the next commit."""

    def commit(self, repo: str, branch: str, files: dict[str, tuple[str, bytes]]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {repo} {sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[repo, branch] = files, oid
        return oid

    def hold(self, repo: str, folder: Path) -> str:
        """Commit the files of a directory to a public repository."""
        self.private[repo] = False
        return self.commit(repo, "main", {path.name: ("regular", path.read_bytes()) for path in folder.iterdir()})

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return {name: content for name, (_, content) in self.commits[self.branches[repo, branch]].items()}

    def resolve(self, repo: str, revision: str) -> str | None:
        return self.branches.get((repo, revision)) or (revision if revision in self.commits else None)


def _entry(path: str, mode: str, content: bytes) -> dict:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if mode == "lfs":
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

    def log_message(self, *args):
        return

    def _send(self, status: int, body: object = b"", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _handle(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        body, path = self._body(), url.path
        hub.requests.append(f"{self.command} {path}")
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            page = f"datasets/{repo}" if asked.get("type") == "dataset" else repo
            if repo in hub.private:
                return self._send(409, {"url": f"/{page}", "error": "You already created this repo"})
            hub.private[repo] = bool(asked.get("private")) or asked.get("visibility") == "private"
            hub.commit(repo, "main", {".gitattributes": ("regular", b"*.parquet filter=lfs\n")})
            return self._send(200, {"url": f"http://{self.headers['Host']}/{page}", "id": repo})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(
            r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+)(?:/(.*))?)?)?", path
        ):
            repo, what, revision, rest = found[1], found[2], unquote(found[3] or "main"), unquote(found[4] or "")
            return self._api(repo, what, revision, rest, body)
        if found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            asked = json.loads(body)["objects"]
            host = f"http://{self.headers['Host']}"
            objects = [
                {
                    **item,
                    **(
                        {}
                        if item["oid"] in hub.objects
                        else {"actions": {"upload": {"href": f"{host}/lfs/{item['oid']}"}}}
                    ),
                }
                for item in asked
            ]
            return self._send(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/json"})
        if path.startswith("/lfs/"):
            if hub.fail_uploads_after is not None:
                hub.fail_uploads_after -= 1
                if hub.fail_uploads_after < 0:
                    return self._send(403, {"error": "quota exceeded"})
            oid = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == oid
            hub.objects[oid] = body
            hub.uploads.append(oid)
            return self._send(200)
        if found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            return self._resolve(found[1], unquote(found[2]), unquote(found[3]))
        return self._send(404, {"error": f"no such page: {path}"})

    def _api(self, repo: str, what: str | None, revision: str, rest: str, body: bytes) -> None:
        hub = self.hub
        if repo not in hub.private:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if what == "branch":
            if (repo, revision) in hub.branches:
                return self._send(409, {"error": "Reference already exists"})
            hub.branches[repo, revision] = hub.branches[repo, "main"]
            return self._send(200, {})
        commit = hub.resolve(repo, revision)
        if commit is None:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        files = hub.commits[commit]
        if what in (None, "revision"):
            siblings = [{"rfilename": name} for name in files]
            return self._send(200, {"id": repo, "sha": commit, "private": hub.private[repo], "siblings": siblings})
        if what == "preupload":
            modes = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": _entry(item["path"], *files[item["path"]])["oid"] if item["path"] in files else None,
                }
                for item in json.loads(body)["files"]
            ]
            return self._send(200, {"files": modes})
        if what == "commit":
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            if hub.race:
                hub.race = False
                hub.commit(repo, revision, {**files, "somebody.txt": ("regular", b"was faster")})
            parent = lines[0]["value"].get("parentCommit")
            if parent is not None and parent != hub.branches[repo, revision]:
                return self._send(412, {"error": "A commit has happened since. Please refresh and try again."})
            changed = dict(files)
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    changed[value["path"]] = ("regular", base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    changed[value["path"]] = ("lfs", hub.objects[value["oid"]])
                else:
                    del changed[value["path"]]
            oid = hub.commit(repo, revision, changed)
            page = f"datasets/{repo}" if "/datasets/" in self.path else repo
            url = f"http://{self.headers['Host']}/{page}/commit/{oid}"
            return self._send(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})
        if what == "tree":
            recursive = "recursive=true" in urlsplit(self.path).query.lower()
            inside = {name: part for name, part in files.items() if not rest or name.startswith(rest + "/")}
            entries, folders = [], set()
            for name, part in inside.items():
                tail = name[len(rest) + 1 if rest else 0 :]
                if recursive or "/" not in tail:
                    entries.append(_entry(name, *part))
                for folder in [tail[:i] for i, c in enumerate(tail) if c == "/"][: None if recursive else 1]:
                    folders.add(f"{rest}/{folder}" if rest else folder)
            if rest and not inside:
                return self._send(404, {"error": "no such entry"}, {"X-Error-Code": "EntryNotFound"})
            entries += [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
            return self._send(200, entries)
        if what == "paths-info":
            asked = (
                json.loads(body)["paths"]
                if body.startswith(b"{")
                else re.findall(r"paths=([^&]+)", unquote(body.decode()))
            )
            return self._send(200, [_entry(name, *files[name]) for name in asked if name in files])
        return self._send(404, {"error": f"no such call: {what}"})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self.hub.resolve(repo, revision)
        if commit is None or name not in self.hub.commits[commit]:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        content = self.hub.commits[commit][name][1]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(found[1]), int(found[2] or len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self.hub.fetched += len(content[start:stop]) * name.endswith(".parquet")
            return self._send(206, content[start:stop], headers)
        self.hub.fetched += len(content) * (name.endswith(".parquet") and self.command == "GET")
        return self._send(200, content, headers)

    do_GET = do_POST = do_PUT = do_HEAD = _handle  # noqa: N815 - as http.server calls them


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Run a stand-in that `huggingface_hub` connects to, with a planted token."""
    import huggingface_hub
    from huggingface_hub import HfFileSystem, constants

    state = Hub()
    handler = type("Handler", (_Handler,), {"hub": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in {
        "ENDPOINT": address,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hf-cache"),
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(transfer, "WAITS", (0.0,))
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # the object keeps the address that it was created with
    HfFileSystem.clear_instance_cache()
    huggingface_hub.utils.disable_progress_bars()
    yield state
    HfFileSystem.clear_instance_cache()
    huggingface_hub.utils.enable_progress_bars()
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()
