"""A HuggingFace hub on loopback: the part of its protocol that huggingface_hub and transformers speak to load a model.

``HF_ENDPOINT`` leads there. Repositories are folders, ``root/OWNER/NAME``. As the real one does, it redirects large
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
PIECE = 65536  # bytes that are sent at a time


class Hub(ThreadingHTTPServer):
    """Serves the repositories below ``root`` until it is closed.

    Attributes:
        gated: repositories whose files only those get who have been granted access.
        cut: names of files, with how much of what is asked for comes before the connection breaks: for 0.5 once the
            first half, after which it is whole; for 0 never anything.
        answers: an error code that all requests get, or None.
        pause: seconds before every piece of a large file.
        asked: ``METHOD /path`` of every request, as they came.
        bytes_sent: of large files.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Conversation)
        self.root = root
        self.gated: set[str] = set()
        self.cut: dict[str, float] = {}
        self.answers: int | None = None
        self.pause = 0.0
        self.asked: list[str] = []
        self.bytes_sent = 0

    @property
    def address(self) -> str:
        """What ``HF_ENDPOINT`` has to be."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def store(self) -> str:
        """Where large files lie; another host, by name, because clients treat redirects to their own host otherwise."""
        return f"http://localhost:{self.server_address[1]}/store"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A hub that serves in a thread of its own."""
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
            self.tell_of(words[2:])
        elif len(words) > 4 and words[2] == "resolve":
            self.resolve("/".join(words[:2]), words[3], "/".join(words[4:]))
        elif words[0] == "store":
            self.send_file(self.server.root / "/".join(words[1:]), {})
        else:
            self.refuse(404, "EntryNotFound", "there is no such page")

    def tell_of(self, words: list[str]) -> None:
        """What the API says of a repository: itself, or the list of its files."""
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
        """A file, or where it lies."""
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
        """Whether the repository is there and open to all; if not, that has been said."""
        if repository in self.server.gated:
            told = f"Access to model {repository} is restricted. You must have access to it and be authenticated."
            self.refuse(401, "GatedRepo", told)
        elif not (self.server.root / repository).is_dir():
            self.refuse(401, "RepoNotFound", "Repository not found")
        else:
            return True
        return False

    def send_file(self, path: Path, headers: dict[str, str]) -> None:
        """A whole file, or its end from the byte that is asked for."""
        data = path.read_bytes()
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if first:
            headers = {**headers, "Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
        self.send_head(206 if first else 200, {**headers, "Accept-Ranges": "bytes"}, len(data) - first)
        if self.command == "HEAD":
            return
        end = len(data)
        if path.name in self.server.cut:
            share = self.server.cut[path.name]
            if share:
                del self.server.cut[path.name]
            end = first + int((end - first) * share)
            self.close_connection = True
        for start in range(first, end, PIECE):
            if path.suffix in LARGE:
                time.sleep(self.server.pause)
                self.server.bytes_sent += min(end, start + PIECE) - start
            self.wfile.write(data[start : min(end, start + PIECE)])

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
