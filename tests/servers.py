"""S3 servers started by tests, and a proxy on loopback that puts faults between them and a client."""

import http.client
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "tester-access", "AWS_SECRET_ACCESS_KEY": "tester-secret-key", "AWS_REGION": "us-east-1"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def started(command: list[str], port: int, **environment: str):
    """A server process that answers on the port."""
    found = Path(sys.executable).with_name(command[0])
    program = str(found) if found.exists() else shutil.which(command[0])
    assert program, f"{command[0]} is not installed"
    process = subprocess.Popen(
        [program, *command[1:]],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def make_bucket(port: int) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
    urllib.request.urlopen(request).read()


@contextmanager
def moto():
    port = free_port()
    with started(["moto_server", "-H", "127.0.0.1", "-p", str(port)], port):
        make_bucket(port)
        yield port


@contextmanager
def localbucket(root: Path, port: int):
    (root / "bucket").mkdir(parents=True, exist_ok=True)
    with started(["localbucket", str(root), "--port", str(port)], port) as process:
        yield process


@contextmanager
def nanio(root: Path):
    """Accepts `If-None-Match: *` and overwrites all the same."""
    port = free_port()
    (root / "bucket").mkdir(parents=True)
    keys = {"NANIO_ACCESS_KEY": KEYS["AWS_ACCESS_KEY_ID"], "NANIO_SECRET_KEY": KEYS["AWS_SECRET_ACCESS_KEY"]}
    command = ["nanio", "serve", "--host", "127.0.0.1", "--port", str(port), "--data-dir", str(root)]
    with started(command, port, **keys):
        yield port


class Proxy:
    """Hands requests on to a server. `fault(method, path, n)` may name a fault for the n-th request.

    Faults: "503", "reset" (connection closed unanswered), "slow" (a second late), "lost" (handed on, then closed
    unanswered), "unconditional" (handed on without its If-None-Match).
    """

    def __init__(self, port: int, fault) -> None:
        self.requests: list[tuple[str, str]] = []
        self.faults: list[str] = []
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.requests.append((self.command, self.path))
                kind = fault(self.command, self.path, len(proxy.requests))
                headers = dict(self.headers.items())
                if kind:
                    proxy.faults.append(kind)
                if kind == "503":
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if kind == "reset":
                    self.close_connection = True
                    return
                if kind == "slow":
                    time.sleep(1)
                if kind == "unconditional":
                    headers = {k: v for k, v in headers.items() if k.lower() != "if-none-match"}
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                data = answer.read()
                if kind == "lost":
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None
        self.port = self._server.server_address[1]

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
