"""A stand-in of the hub: as much of its HTTP API as an upload of a few files needs, in a thread of this process."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

OWNERS = {"wonder-of-the-world": "me", "key-of-another": "other"}
"""Token -> who it belongs to. They are not shaped as the hub's are, so nothing recognises them as secrets."""


@dataclass
class Hub:
    """Contents of the stand-in.

    Attributes:
        public: By repository, True if everyone may read it.
        files: By repository and name, what is committed.
        commits: Title of each commit.
        uploads: Content by digest that has arrived, committed or not.
        breaking: Number of uploads of large files that are still to be broken off.
        requests: Method and path of each request.
    """

    endpoint: str = ""
    public: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    breaking: int = 0
    requests: list[str] = field(default_factory=list)


class Request(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self.hub.requests.append(f"GET {self.path}")
        repo = self.path.removeprefix("/api/models/")
        if self._owner() is None:
            self._answer(401, {"error": "Invalid username or password."})
        elif repo not in self.hub.public:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            self._answer(200, {"_id": "1", "id": repo, "private": not self.hub.public[repo], "siblings": []})

    def do_PUT(self) -> None:
        self.hub.requests.append(f"PUT {self.path}")
        content = self._content()
        if self.hub.breaking:
            self.hub.breaking -= 1
            self.close_connection = True
            self.connection.close()
            return
        self.hub.uploads[self.path.removeprefix("/store/")] = content
        self._answer(200, {})

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        content, path = self._content(), self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif (owner := self._owner()) is None:
            self._answer(401, {"error": f"Invalid credentials: {self.headers.get('Authorization')}"})
        elif path == "/api/repos/create":
            self._create(owner, json.loads(content))
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(content))
        else:
            _, _, _, namespace, name, verb, *_ = path.split("/")
            if namespace != owner:
                self._answer(403, {"error": "You don't have the rights to write here."})
            elif verb == "preupload":
                files = [file["path"] for file in json.loads(content)["files"]]
                modes = {name: "lfs" if name.endswith((".safetensors", ".gguf")) else "regular" for name in files}
                said = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
                self._answer(200, {"files": said})
            else:
                self._commit(f"{namespace}/{name}", [json.loads(line) for line in content.splitlines()])

    def _create(self, owner: str, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo}"}
        if asked["organization"] != owner:
            self._answer(403, {"error": f"You don't have the rights to create a model under {asked['organization']}"})
        elif repo in self.hub.public:
            self._answer(409, {"error": "You already created this model repo", **answer})
        else:
            self.hub.public[repo] = asked.get("visibility") != "private" and not asked.get("private")
            self._answer(200, answer)

    def _batch(self, asked: dict[str, Any]) -> None:
        objects: list[dict[str, Any]] = []
        for item in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/store/{item['oid']}"}}
            objects.append({**item, **({} if item["oid"] in self.hub.uploads else {"actions": upload})})
        self._answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                self.hub.commits.append(value["summary"])
            elif key == "file":
                self.hub.files.setdefault(repo, {})[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                self.hub.files.setdefault(repo, {})[value["path"]] = self.hub.uploads[value["oid"]]
        url = f"{self.hub.endpoint}/{repo}/commit/{'c' * 40}"
        self._answer(200, {"success": True, "commitOid": "c" * 40, "commitUrl": url})

    def _owner(self) -> str | None:
        return OWNERS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty hub inside the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Request,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
