"""A store of objects that answers as S3 does, and fails as one does: by a plan, request by request.

Only what a download takes: HEAD and GET of whole objects, which lie as files in a directory.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# How the answer to a GET goes wrong, by name.
REFUSALS = {
    "slow down": (503, "SlowDown"),
    "internal error": (500, "InternalError"),
    "expired token": (400, "ExpiredToken"),
    "forbidden": (403, "AccessDenied"),
    "missing": (404, "NoSuchKey"),
}
FAULTS = (*REFUSALS, "reset", "cut", "silence", "slow bytes", "garbage")


class FaultServer(ThreadingHTTPServer):
    """Serves a directory as the bucket `corpus`.

    Args:
        folder: The directory.
        silence_seconds: How long it says nothing where that is the fault.

    Attributes:
        plan: What is to go wrong, one fault for each GET of a shard to come; nothing when it is
            empty.
        done: The faults that have happened.
    """

    daemon_threads = True

    def __init__(self, folder: Path, silence_seconds: float = 2.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.silence_seconds = folder, silence_seconds
        self.plan: deque[str] = deque()
        self.done: list[str] = []

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What streaming's downloader of `s3://` is told by, to ask this server."""
        return {
            "S3_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            # Without this the client itself tries again, for seconds.
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing is said of clients that have gone away: that is what is tried here."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultServer
    # Head and body go one by one: else the body waits 40 ms for the head's receipt.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self._answer(b"" if self._data() is None else self._data() or b"", with_body=False)

    def do_GET(self) -> None:
        data = self._data() or b""
        fault = None
        if "shard" in self.path and self.server.plan:
            fault = self.server.plan.popleft()
            self.server.done.append(fault)
        if fault in REFUSALS:
            self._refuse(*REFUSALS[fault])
        elif fault == "silence":
            time.sleep(self.server.silence_seconds)
        elif fault == "garbage":
            self._answer(bytes(len(data)))
        elif fault == "slow bytes":
            self._answer(data, pause_seconds=0.05)
        elif fault in ("reset", "cut"):
            self._answer(data, stop_after=len(data) // 2)
            if fault == "reset":
                # Without a word: what is still to be sent is thrown away.
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
        else:
            self._answer(data)

    def _data(self) -> bytes | None:
        path = self.server.folder / self.path.split("?")[0].removeprefix("/corpus/")
        return path.read_bytes() if path.is_file() else None

    def _refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(
        self,
        data: bytes,
        *,
        with_body: bool = True,
        stop_after: int | None = None,
        pause_seconds: float = 0.0,
    ) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self._data() or b"")))
        self.send_header("ETag", '"one"')
        self.end_headers()
        body = data[:stop_after] if with_body else b""
        pieces = 10 if pause_seconds else 1
        for piece in range(pieces):
            time.sleep(pause_seconds)
            size = -(-len(body) // pieces)
            self.wfile.write(body[piece * size : (piece + 1) * size])
            self.wfile.flush()


@contextmanager
def serving(folder: Path, silence_seconds: float = 2.0) -> Iterator[FaultServer]:
    """A server in a thread of its own, for as long as the context lasts."""
    with FaultServer(folder, silence_seconds) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
