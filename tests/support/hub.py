"""A server that speaks the part of the hub's API that an upload uses, and keeps what it gets in memory."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".parquet")
"""Files that the hub keeps as LFS objects."""


@dataclass
class Repository:
    """A repository: its files, and whether it is private."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """Repositories by ``KIND/OWNER/NAME``, LFS objects by their digest, and the requests in order."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuse: str = ""
    """Beginning of a path whose requests get the answer 403."""


class Handler(BaseHTTPRequestHandler):
    """Answers requests for the hub of the server."""

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *arguments) -> None:
        """Print nothing."""

    def answer(self, status: int, value: object, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if self.hub.refuse and path.startswith(self.hub.refuse):
            return self.answer(403, {"error": "no right to write"})
        if self.headers.get("Authorization") != "Bearer hf_test" and not path.startswith("/object/"):
            return self.answer(401, {"error": "who are you?"})
        return self.route(path, body)

    do_GET = do_POST = do_PUT = handle_any  # noqa: N815 - names of http.server

    def route(self, path: str, body: bytes) -> None:
        if path == "/api/repos/create":
            wanted = json.loads(body)
            private = wanted.get("private", wanted.get("visibility", "public") == "private")
            name = f"{wanted.get('type', 'model')}/{wanted['organization']}/{wanted['name']}"
            self.hub.repositories[name] = Repository(private)
            return self.answer(200, {"url": f"{self.hub.address}/{wanted['organization']}/{wanted['name']}"})
        if path.startswith("/object/"):
            self.hub.objects[path.removeprefix("/object/")] = body
            return self.answer(200, {})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {"oid": one["oid"], "size": one["size"]}
                | {"actions": {"upload": {"href": f"{self.hub.address}/object/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        _, _, kind, owner, name, *rest = path.split("/")
        repository = self.hub.repositories.get(f"{kind.removesuffix('s')}/{owner}/{name}")
        if repository is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self.of_repository(repository, f"{owner}/{name}", rest, body)

    def of_repository(self, repository: Repository, name: str, rest: list[str], body: bytes) -> None:
        if rest[:1] == ["preupload"]:
            files = [
                {"path": one["path"], "shouldIgnore": False}
                | {"uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular"}
                for one in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if rest[:1] == ["commit"]:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository.files[value["path"]] = self.hub.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del repository.files[value["path"]]
            repository.commits.append(lines[0]["value"]["summary"])
            sha = hashlib.sha1(repr(sorted(repository.files.items())).encode()).hexdigest()
            url = f"{self.hub.address}/{name}/commit/{sha}"
            return self.answer(200, {"commitOid": sha, "commitUrl": url})
        if rest[:1] == ["tree"]:
            return self.answer(
                200,
                [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in repository.files.items()
                ],
            )
        siblings = [{"rfilename": path} for path in repository.files]
        return self.answer(
            200, {"id": name, "private": repository.private, "sha": "0" * 40, "siblings": siblings}
        )


@contextmanager
def running_hub():
    """Yield a hub that listens on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
