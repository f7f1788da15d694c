"""A model hub on this machine, as the real one answers: an API, files, and redirects to where large files lie."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
TOKEN = "hf_secret"


@dataclass
class StubHub:
    """What the hub holds, and what it served.

    Attributes:
        models: folder by id and revision (a branch or a commit).
        gated: ids whose files nobody may have.
        ranges: False for a server that knows no ranges.
        served: bytes sent by file, without answers of the API.
        tokens: paths below the place of large files that were asked for with a token.
    """

    models: dict[tuple[str, str], Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    ranges: bool = True
    served: Counter[str] = field(default_factory=Counter)
    tokens: list[str] = field(default_factory=list)
    url: str = ""
    storage: str = ""

    def add(self, name: str, folder: Path, revision: str = "main", commit: str = COMMIT) -> None:
        """Publish a folder under an id."""
        self.models[name, revision] = self.models[name, commit] = folder


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that want no more."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StubHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(content))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_file(self, path: Path, name: str, **headers: str) -> None:
        content, asked = path.read_bytes(), self.headers.get("Range")
        status, part = 200, content
        if asked and self.hub.ranges:
            begin, end = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            part = content[begin : end + 1]
            status, headers["Content_Range"] = 206, f"bytes {begin}-{begin + len(part) - 1}/{len(content)}"
        if self.command == "GET":
            self.hub.served[name] += len(part)
        self.answer(status, part, **headers)


class _Storage(_Handler):
    """Where large files lie: another server, whose links are the permission."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if self.headers.get("Authorization"):
            self.hub.tokens.append(path)
        self.send_file(Path(unquote(path)), Path(path).name)


class _Hub(_Handler):
    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/models/"):
            self.answer_api(path.removeprefix("/api/models/").split("/"))
        else:
            self.answer_file(path.strip("/").split("/"))

    do_HEAD = do_GET

    def answer_api(self, parts: list[str]) -> None:
        name, kind, revision = "/".join(parts[:2]), (parts[2] if len(parts) > 2 else ""), "/".join(parts[3:]) or "main"
        folder = self.folder(name, revision)
        if folder is None:
            return
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        if kind == "tree":
            tree = [
                {"type": "file", "path": file.relative_to(folder).as_posix(), "size": file.stat().st_size, "oid": "0"}
                for file in files
            ]
            self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            return
        siblings = [{"rfilename": file.relative_to(folder).as_posix(), "size": file.stat().st_size} for file in files]
        commit = OTHER_COMMIT if folder is self.hub.models.get((name, OTHER_COMMIT)) else COMMIT
        info = {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False, "downloads": 0}
        self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

    def answer_file(self, parts: list[str]) -> None:
        name, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        folder = self.folder(name, revision)
        if folder is None:
            return
        path = folder / file
        if name in self.hub.gated:
            self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted.")
        elif not path.is_file():
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            etag = f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"'
            headers = {"X_Repo_Commit": revision, "ETag": etag}
            if path.suffix in (".safetensors", ".bin", ".gguf"):
                size = str(path.stat().st_size)
                headers |= {
                    "X_Linked_Size": size,
                    "X_Linked_ETag": etag,
                    "Location": f"{self.hub.storage}{path}?signed",
                }
                self.answer(302, **headers)
            else:
                self.send_file(path, file, **headers)

    def folder(self, name: str, revision: str) -> Path | None:
        if not any(name == known for known, _ in self.hub.models):
            self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif (name, revision) not in self.hub.models:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        else:
            return self.hub.models[name, revision]
        return None


@contextmanager
def running_hub(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[StubHub]:
    """Run a hub that the hub's client takes for the real one, with an empty cache and a token."""
    hub = StubHub()
    servers = []
    for handler in (_Hub, _Storage):
        server = _Server(("127.0.0.1", 0), type("Handler", (handler,), {"hub": hub}))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
    # Another name for the same machine, so that it is another place for a client, as it is on the real hub.
    hub.url, hub.storage = f"http://127.0.0.1:{servers[0].server_port}", f"http://localhost:{servers[1].server_port}"
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
        huggingface_hub.close_session()
