"""A hub on this machine, that answers as the real one does: models of local folders, one that was renamed, one that is gated."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "a" * 40
GATED, RENAMED = "org/gated", {"org/old-name": "org/model"}


class _Answers(BaseHTTPRequestHandler):
    folders: dict[str, Path]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        api, path = path.startswith("api/models/"), path.removeprefix("api/models/")
        name, rest = "/".join(path.split("/")[:2]), path.split("/")[2:]
        if name == GATED:
            self._say(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to model {name} is restricted."})
        elif name in RENAMED:
            self._say(307, {"Location": self.path.replace(name, RENAMED[name], 1)})
        elif name not in self.folders:
            self._say(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif api and rest[:1] == ["tree"]:
            files = [] if rest[2:] else [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in self.folders[name].iterdir()
            ]  # fmt: skip
            self._say(200, {"Content-Type": "application/json"}, json.dumps(files).encode())
        elif api:
            files = [{"rfilename": file.name} for file in self.folders[name].iterdir()]
            found = json.dumps({"id": name, "sha": COMMIT, "siblings": files})
            self._say(200, {"Content-Type": "application/json"}, found.encode())
        else:
            self._file(self.folders[name] / "/".join(rest[2:]))  # resolve/REVISION/FILE

    def _file(self, file: Path) -> None:
        if not file.is_file():
            self._say(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content = file.read_bytes()
        self._say(200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content)

    def _say(self, code: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def hub(folders: dict[str, Path]) -> Iterator[str]:
    """The address of a hub that has these models."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"folders": folders}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
