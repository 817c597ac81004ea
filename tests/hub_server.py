"""A local HTTP server that answers as the Hugging Face Hub does, for huggingface_hub's real client.

    with Hub({"owner/name": Repo({"config.json": b"{}"})}) as hub: ...  # HF_ENDPOINT=hub.endpoint, hub.requests

Model and data set information, file trees, and resolve with its headers; files of 1 kB and more are in "large file
storage": resolve redirects to another host (localhost instead of 127.0.0.1), as the Hub's does to its CDN.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = 1000  # bytes from which on a file is redirected


@dataclass
class Repo:
    """A repository; its commit is made from its content. `tags` are further revisions, each with files of its own."""

    files: dict[str, bytes]
    tags: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False  # its files, not its information, as on the Hub
    private: bool = False
    dataset: bool = False

    def commit(self, revision: str) -> str | None:
        """The full hash of a revision: main, a tag, or a hash."""
        hashes = {
            name: hashlib.sha1(repr(files).encode()).hexdigest() for name, files in self.revisions().items()
        }
        return hashes.get(revision, revision if revision in hashes.values() else None)

    def revisions(self) -> dict[str, dict[str, bytes]]:
        return {"main": self.files} | self.tags

    def at(self, commit: str) -> dict[str, bytes]:
        return next(files for name, files in self.revisions().items() if self.commit(name) == commit)


class Hub(ThreadingHTTPServer):
    """The server, in a thread of its own. `tokens` may read everything; `cut` holds files whose first GET breaks off.

    `whole` holds files that are sent whole, with status 200, even if a range of them is asked for.
    """

    daemon_threads = True

    def __init__(
        self,
        repos: dict[str, Repo],
        pages: dict[str, bytes],
        tokens: tuple[str, ...],
        cut: set[str],
        whole: set[str] = frozenset(),
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.pages, self.tokens, self.cut, self.whole = repos, pages, tokens, set(cut), whole
        self.known = (
            *tokens,
            "hf_stranger",
            "hf_narrow",
        )  # valid: one that may read what is public, one not even that
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Routes: api/{models,datasets}/NAME/{revision,tree}/REV, [datasets/]NAME/resolve/REV/FILE, cdn/SHA256, pages."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        parts = path.strip("/").split("/")
        if path in self.server.pages:
            self.content(path, self.server.pages[path], {})
        elif parts[0] == "cdn":
            self.blob(parts[1])
        elif parts[0] == "api":
            self.api(parts[1] == "datasets", "/".join(parts[2:4]), *parts[4:6])
        else:
            dataset = parts[0] == "datasets"
            owner, name, _, revision, *file = parts[dataset:]
            self.resolve(dataset, f"{owner}/{name}", revision, "/".join(file))

    def allowed(self, dataset: bool, name: str, files: bool) -> Repo | None:
        """The repository, or None after an answer that refuses it."""
        repo = self.server.repos.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.known:
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if token == "hf_narrow":
            return self.refuse(403, None, "This token lacks the permission to read repositories")
        hidden = repo is None or repo.dataset != dataset or (repo.private and token not in self.server.tokens)
        if hidden:  # without a token the Hub does not say whether there is such a repository
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if files and repo.gated and token not in self.server.tokens:
            return self.refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        return repo

    def api(self, dataset: bool, name: str, what: str = "revision", revision: str = "main") -> None:
        if (repo := self.allowed(dataset, name, files=False)) is None:
            return
        if (commit := repo.commit(revision)) is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what == "tree":
            answer = [tree_entry(file, content) for file, content in repo.at(commit).items()]
        else:
            answer = {
                "id": name,
                "sha": commit,
                "siblings": [{"rfilename": file} for file in repo.at(commit)],
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
            }
        self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def resolve(self, dataset: bool, name: str, revision: str, file: str) -> None:
        if (repo := self.allowed(dataset, name, files=True)) is None:
            return
        if (commit := repo.commit(revision)) is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repo.at(commit).get(file)
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        if len(content) < LARGE:
            etag = hashlib.sha1(content).hexdigest()
            return self.content(file, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        digest = hashlib.sha256(content).hexdigest()
        linked = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self.answer(
            302, b"", linked | {"Location": f"http://localhost:{self.server.server_port}/cdn/{digest}"}
        )

    def blob(self, digest: str) -> None:
        for repo in self.server.repos.values():
            for files in repo.revisions().values():
                for file, content in files.items():
                    if hashlib.sha256(content).hexdigest() == digest:
                        return self.content(file, content, {"ETag": f'"{digest}"'})
        self.refuse(404, None, "no such blob")

    def content(self, file: str, content: bytes, headers: dict[str, str]) -> None:
        """A file, or the range of it that is asked for; the first GET of a file in `cut` breaks off in the middle."""
        asked = "bytes=0-" if file in self.server.whole else self.headers.get("Range", "bytes=0-")
        start = int(asked.removeprefix("bytes=").split("-")[0])
        ranged = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        cut = self.command == "GET" and file in self.server.cut
        self.server.cut -= {file} if cut else set()
        self.answer(
            206 if start else 200, content[start:], headers | ranged | {"Accept-Ranges": "bytes"}, cut
        )

    def refuse(
        self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None
    ) -> None:
        named = {"X-Error-Code": code} if code else {}
        self.answer(
            status,
            json.dumps({"error": message}).encode(),
            (headers or {}) | named | {"X-Error-Message": message},
        )

    def answer(self, status: int, body: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True


def tree_entry(file: str, content: bytes) -> dict:
    """A file as the Hub lists it."""
    entry = {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if len(content) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
