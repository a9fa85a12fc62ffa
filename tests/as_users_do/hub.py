"""A HuggingFace hub on loopback: the part of its protocol by which huggingface_hub and transformers load a model.

``HF_ENDPOINT`` is its address. Repositories are folders, ``root/OWNER/NAME``. As the real one does, it redirects large
files to another address, answers ``Range``, hides repositories that do not exist behind a 401, and names each error in
a header. Faults are set on the object while it serves.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".model", ".spm")  # what the real hub keeps in its store of large files
BLOCK = 65536  # bytes that are sent at a time


class Hub(ThreadingHTTPServer):
    """Serves the repositories below ``root`` until it is closed.

    Attributes:
        gated: repositories whose files are only for users with access.
        truncated: names of files, and the share of a request after which the connection breaks: 0.5 breaks once, after
            the first half; 0 breaks every time, before the first byte.
        answers: an error code for all requests, or None.
        pause: seconds before every block of a large file.
        asked: ``METHOD /path`` of every request, in order.
        bytes_sent: of large files.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Conversation)
        self.root = root
        self.gated: set[str] = set()
        self.truncated: dict[str, float] = {}
        self.answers: int | None = None
        self.pause = 0.0
        self.asked: list[str] = []
        self.bytes_sent = 0

    @property
    def address(self) -> str:
        """The value for ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def store(self) -> str:
        """Address of large files, by another host name: clients treat redirects to the same host differently."""
        return f"http://localhost:{self.server_address[1]}/store"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that closes its connection is not an error."""


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A hub in a thread of its own."""
    with Hub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class Conversation(BaseHTTPRequestHandler):
    """One client's requests."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def log_message(self, *_: Any) -> None:
        """The hub's log is ``asked``."""

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        words = path.strip("/").split("/")
        if self.server.answers:
            self.refuse(self.server.answers, "", "")
        elif words[:2] == ["api", "models"]:
            self.describe(words[2:])
        elif len(words) > 4 and words[2] == "resolve":
            self.resolve("/".join(words[:2]), words[3], "/".join(words[4:]))
        elif words[0] == "store":
            self.send_file(self.server.root / "/".join(words[1:]), {})
        else:
            self.refuse(404, "EntryNotFound", "there is no such page")

    def describe(self, words: list[str]) -> None:
        """The API's answer on a repository: its description, or the list of its files."""
        repository, what = "/".join(words[:2]), words[2:]
        if not self.may_read(repository):
            return
        folder = self.server.root / repository
        if not what or what[0] == "revision":
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in files_of(folder)]
            about = {"id": repository, "sha": commit_of(repository), "private": False, "tags": [], "siblings": siblings}
            self.send_json(about)
        elif what[0] == "tree" and (folder / "/".join(what[2:])).is_dir():
            listed = files_of(folder / "/".join(what[2:]))
            entries = [
                {
                    "type": "file",
                    "path": str(path.relative_to(folder)),
                    "size": path.stat().st_size,
                    "oid": etag_of(path),
                }
                for path in listed
            ]
            self.send_json(entries)
        else:
            self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit_of(repository)})

    def resolve(self, repository: str, revision: str, name: str) -> None:
        """A file, or a redirect to it."""
        if not self.may_read(repository):
            return
        commit = {"X-Repo-Commit": commit_of(repository)}
        path = self.server.root / repository / name
        if revision not in ("main", commit_of(repository)):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif not path.is_file():
            self.refuse(404, "EntryNotFound", "Entry not found", commit)
        elif path.suffix in LARGE:
            linked = {"X-Linked-Size": str(path.stat().st_size), "X-Linked-Etag": f'"{etag_of(path)}"'}
            self.send_head(302, {**commit, **linked, "Location": f"{self.server.store}/{repository}/{name}"}, 0)
        else:
            self.send_file(path, {**commit, "ETag": f'"{etag_of(path)}"'})

    def may_read(self, repository: str) -> bool:
        """Whether the repository exists and is open to all; if not, this answers the request."""
        if repository in self.server.gated:
            message = f"Access to model {repository} is restricted. You must have access to it and be authenticated."
            self.refuse(401, "GatedRepo", message)
        elif not (self.server.root / repository).is_dir():
            self.refuse(401, "RepoNotFound", "Repository not found")
        else:
            return True
        return False

    def send_file(self, path: Path, headers: dict[str, str]) -> None:
        """A whole file, or its end from the first byte of ``Range``."""
        data = path.read_bytes()
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if first:
            headers = {**headers, "Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
        self.send_head(206 if first else 200, {**headers, "Accept-Ranges": "bytes"}, len(data) - first)
        if self.command == "HEAD":
            return
        end = len(data)
        if path.name in self.server.truncated:
            share = self.server.truncated[path.name]
            if share:
                del self.server.truncated[path.name]
            end = first + int((end - first) * share)
            self.close_connection = True
        for start in range(first, end, BLOCK):
            if path.suffix in LARGE:
                time.sleep(self.server.pause)
                self.server.bytes_sent += min(end, start + BLOCK) - start
            self.wfile.write(data[start : min(end, start + BLOCK)])

    def send_json(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_head(200, {"Content-Type": "application/json"}, len(data))
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: int, error: str, message: str, headers: dict[str, str] | None = None) -> None:
        self.send_head(code, {"X-Error-Code": error, "X-Error-Message": message, **(headers or {})}, 0)

    def send_head(self, code: int, headers: dict[str, str], length: int) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def commit_of(repository: str) -> str:
    return hashlib.sha1(repository.encode()).hexdigest()


def etag_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
