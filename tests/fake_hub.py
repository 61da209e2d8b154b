"""A hub of models on this machine: as much of the Hugging Face hub's HTTP API as sending and loading adapters use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OWNER, TOKEN = "somebody", "hf_somebody"


class FakeHub:
    """Repositories in memory: each branch is a list of commits, each commit files by path."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, list[dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.asked: list[str] = []
        self.endpoint = ""
        self.large: set[str] = set()
        """Endings of names whose files go by git-lfs, by their SHA-256."""
        self.objects: dict[str, bytes] = {}
        """Content by SHA-256."""

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """What the last commit of a branch holds."""
        return self.repositories[repo_id][branch][-1]

    def commit_of(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for branch, commits in self.repositories.get(repo_id, {}).items():
            for number, files in enumerate(commits):
                oid = hashlib.sha1(f"{repo_id} {branch} {number}".encode()).hexdigest()
                if revision == oid or (revision == branch and files is commits[-1]):
                    return oid, files
        return None


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        hub = self.hub
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.asked.append(f"POST {self.path}")
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials in Authorization header"},
                               X_Error_Message="Invalid credentials in Authorization header")  # fmt: skip
        if self.path == "/api/repos/create":
            given = json.loads(sent)
            repo_id = f"{given['organization'] or OWNER}/{given['name']}"
            if given["organization"] not in (None, OWNER):
                return self.answer(403, {"error": "You don't have the rights to create a model there"})
            there = repo_id in hub.repositories
            if not there:
                hub.repositories[repo_id] = {"main": [{}]}
                hub.private[repo_id] = given.get("visibility") == "private"
            return self.answer(409 if there else 200, {"url": f"{hub.endpoint}/{repo_id}"})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(sent)["objects"]
            actions = [{"upload": {"href": f"{hub.endpoint}/objects/{one['oid']}"}} for one in wanted]
            objects = [{**one, "actions": action} for one, action in zip(wanted, actions, strict=True)]
            return self.answer(200, {"objects": objects, "transfer": "basic"})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/?]+)", self.path)
        assert found is not None, self.path
        repo_id, what, revision = found.groups()
        branches = hub.repositories[repo_id]
        if what == "branch":
            there = revision in branches
            branches.setdefault(revision, [branches["main"][-1]])
            return self.answer(409 if there else 200)
        if revision not in branches:
            return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        if what == "preupload":
            names = [file["path"] for file in json.loads(sent)["files"]]
            modes = ["lfs" if name.endswith(tuple(hub.large)) else "regular" for name in names]
            told = zip(names, modes, strict=True)
            return self.answer(
                200, {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in told]}
            )
        files = dict(branches[revision][-1])
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "header":
                hub.messages.append(line["value"]["summary"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = hub.objects[line["value"]["oid"]]
            else:
                assert line["key"] == "file", line
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        branches[revision].append(files)
        oid = hub.commit_of(repo_id, revision)
        assert oid is not None
        self.answer(200, {"commitUrl": f"{hub.endpoint}/{repo_id}/commit/{oid[0]}", "commitOid": oid[0]})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        if re.fullmatch(r"/api/models/[^/]+/[^/]+", path):  # whether it is there, where it may not be made
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)/?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        assert found is not None, path
        commit = self.hub.commit_of(found[1], found[3] if api else found[2])
        if commit is None:
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        oid, files = commit
        if api and api[2] == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, {"id": found[1], "modelId": found[1], "sha": oid, "siblings": siblings})
        if api:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
                for name, content in files.items()
            ]
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        assert file is not None
        if file[3] not in files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        content = files[file[3]]
        self.answer(200, content, ETag=f'"{blob_id(content)}"', X_Repo_Commit=oid)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        oid = self.path.removeprefix("/objects/")
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self.answer(200)


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub that answers for the length of the block; `endpoint` is its address."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfHub", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
