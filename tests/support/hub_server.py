"""A small hub on 127.0.0.1, as far as the huggingface_hub client asks: listings, files, commits.

It can cut connections in the middle of a file, ask for a token and keep what is pushed.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from conftest import ROOT
from support.hosts import run_python

TOKEN = "hf_" + "secret" * 5
_API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|preupload|commit)/(.+))?"
)
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """One commit of a repository.

    Attributes:
        needs_token, is_gated: who may read it.
        cuts: by file, how many bytes of each next answer arrive before the connection breaks.
    """

    files: dict[str, bytes]
    branches: tuple[str, ...] = ("main",)
    needs_token: bool = False
    is_gated: bool = False
    cuts: dict[str, list[int]] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        content = repr(sorted(self.files.items())).encode()
        return hashlib.sha1(content).hexdigest()


@dataclass
class Request:
    """What the server was asked."""

    method: str
    path: str
    range: str | None


@dataclass
class Hub:
    """The repositories of a server, by "models/owner/name", and what it was asked and told."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def downloads(self) -> list[str]:
        """Names of the files that were sent, in turn."""
        paths = [request.path for request in self.requests if request.method == "GET"]
        return [found[4] for found in map(_FILE.fullmatch, paths) if found]

    def run(
        self, arguments: list[str], home: Path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with this hub, a cache of its own and no token, unless they are given."""
        return run_python(arguments, self.environment(home) | environment, ROOT)

    def environment(self, home: Path) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _send(self, content: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, value: object, code: int = 200) -> None:
        self._send(json.dumps(value).encode(), code, Content_Type="application/json")

    def _refuse(self, code: int, error: str) -> None:
        self._send(b"{}", code, X_Error_Code=error, X_Error_Message=error)

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, key: str, revision: str) -> Repository | None:
        """Find a repository, or answer why not."""
        repository = self.hub.repositories.get(key)
        if repository is None or (repository.needs_token and not self._has_token()):
            self._refuse(401, "RepoNotFound")
        elif repository.is_gated:
            self._refuse(403, "GatedRepo")
        elif revision not in (*repository.branches, repository.sha):
            self._refuse(404, "RevisionNotFound")
        else:
            return repository
        return None

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range")))
        if path == "/api/whoami-v2":
            if self._has_token():
                self._send_json({"type": "user", "name": "owner", "auth": {}})
            else:
                self._refuse(401, "Unauthorized")
        elif found := _FILE.fullmatch(path):
            kind = "datasets" if found[1] else "models"
            repository = self._repository(f"{kind}/{found[2]}", found[3])
            if repository is not None:
                self._send_file(repository, found[4])
        elif found := _API.fullmatch(path):
            repository = self._repository(f"{found[1]}/{found[2]}", found[4] or "main")
            if repository is not None:
                self._send_listing(found[2], repository, is_tree=found[3] == "tree")
        else:
            self._refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def _send_listing(self, name: str, repository: Repository, is_tree: bool) -> None:
        entries = [
            {"type": "file", "path": path, "oid": _etag(content), "size": len(content)}
            for path, content in repository.files.items()
        ]
        siblings = [{"rfilename": path} for path in repository.files]
        info = {"id": name, "sha": repository.sha, "siblings": siblings, "private": False}
        self._send_json(entries if is_tree else info)

    def _send_file(self, repository: Repository, name: str) -> None:
        content = repository.files.get(name)
        if content is None:
            self._refuse(404, "EntryNotFound")
            return
        headers = {"ETag": f'"{_etag(content)}"', "X_Repo_Commit": repository.sha}
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(begin[1]) if begin else 0
        cuts = repository.cuts.get(name)
        if self.command == "HEAD" or not cuts:
            code = 206 if start else 200
            self._send(content[start:], code, **headers, Accept_Ranges="bytes")
            return
        self.send_response(206 if start else 200)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + cuts.pop(0)])
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self._read()
        self.hub.requests.append(Request("POST", path, None))
        if not self._has_token():
            self._refuse(401, "Unauthorized")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            self.hub.created.append(asked)
            name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            self.hub.repositories.setdefault(f"models/{name}", Repository({}))
            self._send_json({"url": f"{self.hub.url}/{name}"})
        elif (found := _API.fullmatch(path)) and found[3] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._send_json({"files": files})
        elif found and found[3] == "commit":
            repository = self.hub.repositories[f"{found[1]}/{found[2]}"]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "header":
                    self.hub.messages.append(entry["value"]["summary"])
            url = f"{self.hub.url}/{found[2]}/commit/{repository.sha}"
            self._send_json({"commitUrl": url, "commitOid": repository.sha})
        else:
            self._send_json({})


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving(**repositories: Repository) -> Iterator[Hub]:
    """Serve repositories, by names like models__owner__name, until the end of the block."""
    hub = Hub(repositories={key.replace("__", "/"): value for key, value in repositories.items()})
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder's files as a repository has them."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
