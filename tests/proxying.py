"""Other HTTP servers as they are on Debian, each with a configuration of its own, on a free port."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servers import START_SECONDS_MAX, free_port, missing

#: What the tables of raw requests say of nginx was seen at this version.
NGINX_VERSION = "1.22"

NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/bodies;
    proxy_temp_path {folder}/proxied;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    default_type application/json;
    {http}
    server {{
        listen 127.0.0.1:{port};
        {server}
    }}
}}
"""

HAPROXY = """
global
    maxconn 1000
defaults
    mode http
    timeout connect 30s
    timeout client 60s
    timeout server 60s
    http-reuse always
frontend orders
    bind 127.0.0.1:{port}
    default_backend expediter
backend expediter
    server one {upstream}
"""


def program(name: str, package: str) -> str:
    """Return the path of a program; where it is missing the test is skipped, or fails in CI."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        missing(package)
        raise AssertionError
    return found


def nginx_version() -> str:
    """Return its version, as in 1.22."""
    said = subprocess.run([program("nginx", "nginx-light"), "-v"], capture_output=True, text=True, check=True)
    found = re.search(r"nginx/(\d+\.\d+)", said.stderr)
    assert found is not None, said.stderr
    return found[1]


@contextmanager
def nginx(folder: Path, server: str, http: str = "") -> Iterator[str]:
    """Run nginx with this in its `server` and `http` blocks, and give its address."""
    port = free_port()
    configuration = folder / "nginx.conf"
    configuration.write_text(NGINX.format(folder=folder, port=port, server=server, http=http))
    command = [program("nginx", "nginx-light"), "-p", str(folder), "-c", str(configuration)]
    with running(command, folder, port) as address:
        yield address


@contextmanager
def haproxy(folder: Path, upstream: str) -> Iterator[str]:
    """Run haproxy before `upstream`, as in 127.0.0.1:8000, and give its address."""
    port = free_port()
    configuration = folder / "haproxy.cfg"
    configuration.write_text(HAPROXY.format(port=port, upstream=upstream))
    with running([program("haproxy", "haproxy"), "-db", "-f", str(configuration)], folder, port) as address:
        yield address


@contextmanager
def running(command: list[str], folder: Path, port: int) -> Iterator[str]:
    """Run a server until the end of this, and give its address once it listens on `port`."""
    log = folder / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(START_SECONDS_MAX)
