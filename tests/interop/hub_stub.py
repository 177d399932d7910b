"""The part of the Hugging Face hub's HTTP interface that pushing and loading a model needs, on 127.0.0.1.

Written after what huggingface_hub 2.4 sends and reads. Large files go by Git LFS: Xet's protocol would be
another program.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_aVeryPrivateToken"
USER = {
    "name": "me",
    "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}],
    "auth": {"accessToken": {"displayName": "x", "role": "write"}},
}
LARGE = (".safetensors", ".onnx", ".png")


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repository:
    def __init__(self, private):
        self.private = private
        self.commits = [{".gitattributes": b"*.safetensors filter=lfs\n"}]

    @property
    def files(self):
        return self.commits[-1]

    @property
    def sha(self):
        return hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """What it holds and was asked; `broken` is a pattern of requests that it hangs up on."""

    daemon_threads = True

    def __init__(self, large=LARGE):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.large, self.user, self.broken = large, dict(USER), None
        self.repositories, self.objects, self.asked = {}, {}, []

    def handle_error(self, request, client_address):
        """Quietly: clients hang up too."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value=b"", status=200, **headers):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.server.asked.append(request)
        if self.server.broken and re.search(self.server.broken, request):
            self.close_connection = True
            return
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, request):
                names = match.groupdict()
                if (name := names.pop("repository", None)) is not None:
                    repository = self.server.repositories.get(name)
                    if repository is None or (repository.private and not authorized):
                        self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                        return
                    names["repository"] = repository
                    names["name"] = name
                elif not authorized and not path.startswith("/lfs/"):
                    self.answer({"error": "Invalid credentials in Authorization header"}, 401)
                    return
                method(self, body=body, **names)
                return
        self.answer({"error": f"the stub does not know {request}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def whoami(self, body):
        self.answer(self.server.user)

    def validate(self, body):
        wrong = "license: MIT" in json.loads(body)["content"]
        errors = [{"message": '"license" must be one of [mit]'}] if wrong else []
        self.answer({"errors": errors}, 400 if wrong else 200)

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            self.answer(answer | {"error": "You already created this model repo"}, 409)
            return
        self.server.repositories[name] = Repository(asked["visibility"] == "private")
        self.answer(answer)

    def info(self, body, repository, name):
        files = [{"rfilename": path} for path in repository.files]
        self.answer({"id": name, "sha": repository.sha, "private": repository.private, "siblings": files})

    def settings(self, body, repository, name):
        repository.private = json.loads(body)["visibility"] == "private"
        self.answer({})

    def preupload(self, body, repository, name):
        asked = json.loads(body)["files"]
        self.answer({"files": [self.mode(repository, file["path"]) for file in asked]})

    def mode(self, repository, path):
        content, large = repository.files.get(path), path.endswith(self.server.large)
        oid = None if content is None else self.oid(path, content)
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def oid(self, path, content):
        large = path.endswith(self.server.large)
        return hashlib.sha256(content).hexdigest() if large else git_oid(content)

    def batch(self, body, repository, name):
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}}
            objects.append({**asked, **({} if asked["oid"] in self.server.objects else upload)})
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.answer()

    def commit(self, body, repository, name):
        files = dict(repository.files)
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                assert key == "header"
        repository.commits.append(files)
        sha = repository.sha
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def tree(self, body, repository, name):
        self.answer(
            [
                {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
                for path, content in repository.files.items()
            ]
        )

    def resolve(self, body, repository, name, path):
        if path not in repository.files:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return
        content = repository.files[path]
        self.answer(content, ETag=f'"{git_oid(content)}"', X_Repo_Commit=repository.sha)


MODEL = "/api/models/(?P<repository>[^/]+/[^/]+)"
ROUTES = [
    ("GET /api/whoami-v2", Handler.whoami),
    ("POST /api/validate-yaml", Handler.validate),
    ("POST /api/repos/create", Handler.create),
    (f"GET {MODEL}(/revision/[^/]+)?", Handler.info),
    (f"PUT {MODEL}/settings", Handler.settings),
    (f"POST {MODEL}/preupload/main", Handler.preupload),
    (f"POST {MODEL}/commit/main", Handler.commit),
    (f"GET {MODEL}/tree/[^/]+", Handler.tree),
    (r"POST /(?P<repository>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT /lfs/(?P<oid>[0-9a-f]{64})", Handler.store),
    ("(GET|HEAD) /(?P<repository>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def running(**options):
    with Hub(**options) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()
