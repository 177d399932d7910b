"""Between DVC's WebDAV client and rclone's server on this machine: paths in URLs, and no proxy.

Run as a program it is DVC, whose client asks no proxy on the way to this machine.
"""

import base64
import http.client
import re
import runpy
from contextlib import closing, suppress
from typing import Any
from urllib.parse import quote

HOST = "127.0.0.1"
USER = "drift"


def can_be_asked_for(path: str) -> bool:
    """Whether DVC's client, which gets a URL with `path` in it as it is, asks for that very path."""
    if re.search(r"[%?#\x00-\x1f\x7f]", path):
        return False
    # Where rclone's server (Go) would have quoted other characters, it takes what was sent for the path
    return _sent(path) in (path, quote(path, safe="/-_.~$&+,:;=@"))


def status_of_folder(port: int, path: str, password: str) -> int | None:
    """What the server answers to a question about the folder `path`, asked as DVC's client asks it.

    None if it does not answer (yet).
    """
    secret = base64.b64encode(f"{USER}:{password}".encode()).decode()
    headers = {"Authorization": f"Basic {secret}", "Depth": "0"}
    connection = http.client.HTTPConnection(HOST, port, timeout=5)  # asks no proxy
    with closing(connection), suppress(OSError, http.client.HTTPException):
        connection.request("PROPFIND", _sent(path) + "/", headers=headers)
        return connection.getresponse().status
    return None


def _sent(path: str) -> str:
    import httpx  # of the extra "share", as webdav4 below

    return httpx.URL(f"http://{HOST}{path}").raw_path.decode()


def _run_dvc() -> None:
    import httpx
    import webdav4.client

    class Client(webdav4.client.HTTPClient):
        def __init__(self, **options: Any):
            local = httpx.URL(options["base_url"]).host == HOST
            super().__init__(**options, trust_env=not local)

    webdav4.client.HTTPClient = Client
    runpy.run_module("dvc", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run_dvc()
