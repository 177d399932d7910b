"""DVC as a program whose storage is a WebDAV server on this machine, for this one command.

`$DRIFT_STORAGE` is JSON: the project's `.dvc` (`dvc_dir`), the name of the DVC remote that the server
replaces (`name`), and its new settings (`settings`). No configuration file changes.
"""

import json
import os
import sys
from typing import Any

VARIABLE = "DRIFT_STORAGE"


def main(arguments: list[str]) -> int:
    """Run DVC with `arguments`; its exit code."""
    import httpx
    import webdav4.client
    from dvc.cli import main as run_dvc
    from dvc.config import Config

    storage = json.loads(os.environ.pop(VARIABLE))
    load = Config.load

    def load_with_storage(self: Config, *args: Any, **options: Any) -> None:
        load(self, *args, **options)
        if self.local_dvc_dir == storage["dvc_dir"]:  # as of any revision
            self["remote"][storage["name"]] = dict(storage["settings"])
            self["core"]["remote"] = storage["name"]

    class Client(webdav4.client.HTTPClient):
        def __init__(self, **options: Any):
            # httpx prepares for a SOCKS proxy, which needs another package, even where no_proxy rules it out
            local = httpx.URL(options["base_url"]).host == "127.0.0.1"
            super().__init__(**options, trust_env=not local)

    Config.load, webdav4.client.HTTPClient = load_with_storage, Client
    return run_dvc(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
