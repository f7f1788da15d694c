"""A model hub on this machine, for tests of uploads: what its client asks, answered by a small server."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

ME = {
    "type": "user", "id": "1", "name": "me", "fullname": "Me", "orgs": [{"name": "team"}],
    "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}},
}  # fmt: skip


class Hub:
    """Repositories in memory: id -> (private, name of a file -> its content).

    Attributes:
        me: what the hub says of the token.
        repos: the repositories.
        asked: (method, path) of every request.
        refuses: pattern of paths that are refused, with the status that is answered.
    """

    def __init__(self) -> None:
        self.me: dict[str, Any] = dict(ME)
        self.repos: dict[str, tuple[bool, dict[str, bytes]]] = {}
        self.asked: list[tuple[str, str]] = []
        self.refuses: tuple[str, int] | None = None
        self.commits = 0
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Return status, JSON and headers."""
        self.asked.append((method, path))
        if self.refuses is not None and re.search(self.refuses[0], path):
            return self.refuses[1], {"error": "no, says the hub"}, {}
        if path == "/api/whoami-v2":
            return 200, self.me, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            assert json.loads(body)["repoType"] == "model"
            return 200, {"errors": [], "warnings": []}, {}
        match = re.match(r"/api/models/([^/]+/[^/]+)(?:/([a-z-]+))?", path)
        if match is None:
            return 404, {"error": "not here"}, {}
        if match[1] not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        private, files = self.repos[match[1]]
        if match[2] == "preupload":
            entries = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                       for each in json.loads(body)["files"]]  # fmt: skip
            return 200, {"files": entries}, {}
        if match[2] == "commit":
            return self._commit(match[1], body)
        if match[2] == "paths-info":
            wanted = re.findall(rb"coterie\.json", body)
            entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": blob(files[name])}
                       for name in {each.decode() for each in wanted} if name in files]  # fmt: skip
            return 200, entries, {}
        siblings = [{"rfilename": name} for name in files]
        return 200, {"id": match[1], "modelId": match[1], "private": private, "siblings": siblings, "tags": []}, {}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = {"url": f"{self.url}/{repo_id}"}
        if repo_id in self.repos:
            return 409, url | {"error": "exists"}, {}
        self.repos[repo_id] = (wanted.get("visibility") == "private", {".gitattributes": b"*"})
        return 200, url, {}

    def _commit(self, repo_id: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                assert entry["value"]["encoding"] == "base64"
                self.repos[repo_id][1][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self.commits += 1
        oid = f"{self.commits:040x}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo_id}/commit/{oid}"}, {}


def blob(content: bytes) -> str:
    """Return the name that git gives to content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a hub, and let its client find it, with a token."""
    from huggingface_hub import constants

    stub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self._body()
            status, content, headers = stub.answer(self.command, self.path.partition("?")[0], body)
            encoded = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Type": "application/json"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST = do_HEAD = _handle

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", stub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield stub
    server.shutdown()
    thread.join()
    server.server_close()
