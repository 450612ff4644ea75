"""A hub of models on localhost: what `huggingface_hub` asks of the real one to upload and download small files."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

USER, TOKEN = "user", "hf_test"
REPO, BRANCH = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<branch>(refs/pr/)?[\w.-]+)"


class FakeHub(ThreadingHTTPServer):
    """Serves on a free port until it is shut down.

    Attributes:
        repos: `{repo: {branch: {path: bytes}}}`.
        commits: `(repo, branch, summary, paths)` of every commit, in order.
        private: the repositories that were made private.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.commits: list[tuple[str, str, str, list[str]]] = []
        self.private: set[str] = set()

    def environment(self) -> dict[str, str]:
        """For a process that uses this hub and no other."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args):
        pass

    def _answer(self, status: int, body=b"", **headers) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        path = unquote(path)
        for pattern, method in self.ROUTES.items():
            if found := re.fullmatch(pattern, path):
                if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self._answer(401, {"error": "Invalid username or password."})
                return method(self, body=body, query=query, **found.groupdict())
        return self._answer(404, {"error": path})

    do_GET = do_POST = do_HEAD = _handle

    def _create(self, body, query) -> None:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        made = {"url": f"{self.server.url}/{repo}", "name": repo}
        if repo in self.server.repos:
            return self._answer(409, {"error": "You already created this model repo", **made})
        self.server.repos[repo] = {"main": {}}
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.server.private.add(repo)
        return self._answer(200, made)

    def _branch(self, body, query, repo, branch) -> None:
        branches = self.server.repos[repo]
        if branch in branches:
            return self._answer(409, {"error": "Reference already exists"})
        branches[branch] = dict(branches["main"])
        return self._answer(200, {})

    def _preupload(self, body, query, repo, branch) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        return self._answer(
            200, {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        )

    def _commit(self, body, query, repo, branch) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
        self.server.commits.append((repo, branch, lines[0]["value"]["summary"], sorted(files)))
        self.server.repos[repo][branch].update(files)
        oid = hashlib.sha1(str(len(self.server.commits)).encode()).hexdigest()
        return self._answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid})

    def _pull_request(self, body, query, repo) -> None:
        """The only one of a repository."""
        branches = self.server.repos[repo]
        branches.setdefault("refs/pr/1", dict(branches["main"]))
        answer = {"num": 1, "title": "", "createdAt": "2026-01-01T00:00:00.000Z", "status": "draft", "events": []}
        answer |= {"repo": {"name": repo, "type": "model"}, "isPullRequest": True}
        return self._answer(200, answer | {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": []})

    def _resolve(self, body, query, repo, branch, path) -> None:
        branches = self.server.repos.get(repo)
        if branches is None:
            return self._answer(404, X_Error_Code="RepoNotFound")
        if branch not in branches:
            return self._answer(404, X_Error_Code="RevisionNotFound")
        commit = hashlib.sha1(f"{repo}@{branch}{len(self.server.commits)}".encode()).hexdigest()
        content = branches[branch].get(path)
        if content is None:
            return self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        return self._answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)

    def _validate(self, body, query) -> None:
        return self._answer(200, {"errors": [], "warnings": []})

    ROUTES = {
        "/api/repos/create": _create,
        "/api/validate-yaml": _validate,
        rf"/api/models/{REPO}/discussions(/1)?": _pull_request,
        rf"/api/models/{REPO}/branch/{BRANCH}": _branch,
        rf"/api/models/{REPO}/preupload/{BRANCH}": _preupload,
        rf"/api/models/{REPO}/commit/{BRANCH}": _commit,
        rf"/{REPO}/resolve/{BRANCH}/(?P<path>.+)": _resolve,
    }
