"""A real S3 server on loopback, and a proxy before it that does what networks do."""

from __future__ import annotations

import http.client
import logging
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import pytest

BUCKET = "bucket"
Fault = Literal["500", "reset", "short", "silent", "slow", "expired", "denied"]
_ANSWERS: dict[str, tuple[int, str]] = {
    "500": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
    "denied": (403, "AccessDenied"),
}


@dataclass
class ObjectStore:
    """What a test asks of the server.

    Attributes:
        client: boto3's, past the proxy.
        endpoint: The proxy's.
        fault: What befalls a request (method, path), if anything.
        requests: Those that came, in their order.
    """

    client: Any
    endpoint: str
    fault: Callable[[str, str], Fault | None] = lambda method, path: None
    requests: list[tuple[str, str]] = field(default_factory=list)

    def names(self, prefix: str = "") -> list[str]:
        """Names of all objects."""
        pages = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for entry in pages.get("Contents", [])]

    def get(self, key: str) -> bytes:
        """What is in an object."""
        data: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return data

    def put(self, key: str, data: bytes) -> None:
        """Make an object."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def clear(self) -> None:
        """Delete all objects and forget what came."""
        for key in self.names():
            self.client.delete_object(Bucket=BUCKET, Key=key)
        self.requests.clear()
        self.fault = lambda method, path: None


def fails_first(fault: Fault, times: int, *, method: str = "GET") -> Callable[..., Fault | None]:
    """Have the first requests of a kind fail."""
    left = [times]

    def decide(asked: str, path: str) -> Fault | None:
        if asked != method or not left[0]:
            return None
        left[0] -= 1
        return fault

    return decide


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run server and proxy, and point all clients there."""
    pytest.importorskip("obstore", reason="needs the extra remote")
    server_module = pytest.importorskip("moto.server", reason="needs moto[s3] with flask")
    boto3 = pytest.importorskip("boto3")
    logging.getLogger("werkzeug").setLevel("ERROR")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    behind = server.get_host_and_port()
    store: ObjectStore

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body go one by one: else the body waits 40 ms for the head's receipt.
        disable_nagle_algorithm = True

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            store.requests.append((self.command, self.path))
            fault = store.fault(self.command, self.path)
            if fault == "reset":
                # With this, closing sends a reset.
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.close_connection = True
                self.connection.close()
            elif fault == "silent":
                self.close_connection = True
                over.wait(30)
            elif fault in _ANSWERS:
                status, code = _ANSWERS[fault]
                self.answer(status, {}, f"<Error><Code>{code}</Code></Error>".encode())
            else:
                connection = http.client.HTTPConnection(*behind)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
                connection.request(self.command, self.path, body, headers)
                reply = connection.getresponse()
                data = reply.read()
                connection.close()
                self.answer(reply.status, dict(reply.headers), data, cut=fault in ("short", "slow"))
                if fault == "slow":
                    over.wait(2)

        def answer(
            self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False
        ) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                    self.send_header(name, value)
            length = headers.get("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.close_connection = True

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

        def log_message(self, format: str, *args: Any) -> None:
            pass

    over = threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy, pytest.MonkeyPatch.context() as env:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        # Requests that are still open when the tests end.
        proxy.handle_error = lambda request, address: None  # type: ignore[method-assign]
        endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
            env.delenv(name, raising=False)
        env.setenv("AWS_ACCESS_KEY_ID", "the-key")
        env.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
        env.setenv("AWS_DEFAULT_REGION", "us-east-1")
        env.setenv("S3_ENDPOINT_URL", endpoint)
        client = boto3.client("s3", endpoint_url=f"http://{behind[0]}:{behind[1]}")
        client.create_bucket(Bucket=BUCKET)
        store = ObjectStore(client, endpoint)
        try:
            yield store
        finally:
            over.set()
            proxy.shutdown()
            thread.join()
            client.close()
            server.stop()
