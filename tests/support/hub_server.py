# SPDX-License-Identifier: Apache-2.0
"""A Hub on loopback for the tests: repositories in memory, spoken to over real HTTP.

    with HubServer(user="tester", token="hf_test", orgs=("acme",)) as hub:
        subprocess.run([...], env=hub_env(hub, tmp_path))       # pytest's own process is offline
        hub.repos["acme/x"].files["adapter_model.safetensors"]  # bytes; "datasets/acme/x" for data

As on the Hub: a new repository holds `.gitattributes`; a card's metadata is checked on
`/api/validate-yaml` and again on the commit; what a token may not see is "not found". Not here:
branches, tags, pull requests, pages (a list is one page), multi-part uploads, Xet, search.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml  # huggingface_hub depends on it

DATE = "2026-01-01T00:00:00.000Z"
LFS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".gguf", ".parquet", ".arrow", ".gz", ".zip")


class Blob(NamedTuple):
    data: bytes
    lfs: bool

    def info(self, path: str) -> dict:
        """A tree entry; the oid is sha256 for LFS and the git blob id for the rest."""
        size = len(self.data)
        if not self.lfs:
            oid = hashlib.sha1(b"blob %d\0" % size + self.data).hexdigest()
            return {"type": "file", "path": path, "size": size, "oid": oid}
        oid = hashlib.sha256(self.data).hexdigest()
        lfs = {"oid": oid, "sha256": oid, "size": size, "pointerSize": 134}
        return {"type": "file", "path": path, "size": size, "oid": oid, "lfs": lfs}


class Commit(NamedTuple):
    sha: str
    message: str
    tree: dict[str, Blob]


@dataclass
class Repo:
    key: str  # "ns/name", "datasets/ns/name", "spaces/ns/name"
    private: bool
    commits: list[Commit] = field(default_factory=list)  # oldest first; the last one is main

    @property
    def sha(self) -> str:
        return self.commits[-1].sha

    @property
    def files(self) -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.commits[-1].tree.items()}

    @property
    def lfs_paths(self) -> set[str]:
        return {path for path, blob in self.commits[-1].tree.items() if blob.lfs}

    def at(self, revision: str) -> Commit:
        for commit in reversed(self.commits):
            if revision in ("main", commit.sha):
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, tree: dict[str, Blob], message: str) -> Commit:
        oids = [f"{path} {blob.info(path)['oid']}" for path, blob in sorted(tree.items())]
        text = "\n".join([self.key, str(len(self.commits)), message, *oids])
        self.commits.append(Commit(hashlib.sha1(text.encode()).hexdigest(), message, tree))
        return self.commits[-1]


class Request(NamedTuple):
    method: str
    path: str  # as sent, without the query
    query: dict[str, str]
    headers: dict[str, str]  # lower-case names
    body: bytes
    status: int  # below 1: see `fail_next`


class Reply(NamedTuple):
    body: object = None  # bytes go out as they are, anything else as JSON
    status: int = 200
    headers: dict[str, str] = {}


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str = "", url: str = "", commit: str = ""):
        super().__init__(message)
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        body = {"error": message} | ({"url": url} if url else {})
        self.reply = Reply(body, status, {name: value for name, value in headers.items() if value})


class HubServer:
    """One user, one token; `role="read"` makes the token read-only. See the module's docstring."""

    def __init__(self, user="tester", token="hf_test", orgs=("acme",), role="write"):
        self.user, self.token, self.orgs, self.role = user, token, tuple(orgs), role
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict] = {}
        self.gated: set[str] = set()  # may be seen, and not be read, by this user
        self.lfs: dict[str, bytes] = {}  # sha256 -> content, uploaded but perhaps never committed
        self.requests: list[Request] = []
        self._faults: list[dict] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._httpd.server_address[1]}"
        self.closed = False
        self.closing = threading.Event()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._httpd.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closed = True
        self.closing.set()
        self._httpd.shutdown()
        self._httpd.server_close()

    def fail_next(
        self, method, path_regex, status, times=1, *, after=False, headers=None, body=None
    ):
        """Answer the next `times` matching requests with `status`.

        0: drop the connection, -1: never answer, -2: drop it in the middle of the true answer,
        -3: drop it in the middle of the request.

        `after=True` does the work and loses only the answer; `headers` may hold X-Error-Code;
        `body` is sent in place of an error."""
        fault = {"method": method, "path": path_regex, "times": times, "after": after}
        body = {"error": "injected"} if body is None else body
        fault["reply"] = Reply(body, status, headers or {})
        self._faults.append(fault)

    def hangs_up(self, method: str, path: str) -> bool:
        """Whether the connection is dropped before the request is heard to its end."""
        with self._lock:
            for fault in self._faults:
                here = fault["method"] == method and re.search(fault["path"], path)
                if here and fault["times"] > 0 and fault["reply"].status == -3:
                    fault["times"] -= 1
                    self.requests.append(Request(method, path, {}, {}, b"", -3))
                    return True
        return False

    def add_repo(self, key: str, files: dict[str, bytes] | None = None, private=False) -> Repo:
        """Put a repository there without HTTP, under any namespace."""
        repo = self.repos[key] = Repo(key, private)
        tree = {path: Blob(data, is_lfs(path, data)) for path, data in (files or {}).items()}
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS)
        repo.commit({".gitattributes": Blob(rules.encode(), False)} | tree, "initial commit")
        return repo

    def sent(self, method: str, path_regex: str = "") -> list[Request]:
        return [r for r in self.requests if r.method == method and re.search(path_regex, r.path)]

    def answer(self, method: str, path: str, query: dict, headers: dict, body: bytes) -> Reply:
        with self._lock:
            fault = None
            for candidate in self._faults:
                here = candidate["method"] == method and re.search(candidate["path"], path)
                if here and candidate["times"] > 0 and candidate["reply"].status != -3:
                    fault = candidate
                    fault["times"] -= 1
                    break
            reply = Reply()
            if fault is None or fault["after"]:
                try:
                    reply = self._route(method, path, query, headers, body)
                except HubError as error:
                    reply = error.reply
                except Exception as error:  # a request this server was not made for
                    reply = HubError(400, f"the test server failed: {error!r}").reply
            if fault and fault["reply"].status == -2:
                reply = self._route(method, path, query, headers, body)._replace(status=-2)
            else:
                reply = fault["reply"] if fault else reply
            self.requests.append(Request(method, path, query, headers, body, reply.status))
            return reply

    def _route(self, method: str, path: str, query: dict, headers: dict, body: bytes) -> Reply:
        if method == "PUT" and path.startswith("/_lfs/"):  # a signed address: it needs no token
            oid = path.removeprefix("/_lfs/")
            if hashlib.sha256(body).hexdigest() != oid:
                raise HubError(400, "the content does not have the promised sha256")
            self.lfs[oid] = body
            return Reply()
        token = headers.get("authorization", "").removeprefix("Bearer ")
        if token and token != self.token:
            raise HubError(401, "Invalid credentials in Authorization header")
        member = bool(token)
        is_json = headers.get("content-type", "").endswith(("/json", "+json"))
        data = json.loads(body) if is_json else {}
        file = re.fullmatch(r"/((?:datasets/|spaces/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if file and method in ("GET", "HEAD"):
            key, revision, name = map(unquote, file.groups())
            return self._resolve(self._seen(key, member), revision, name)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match [method, *parts]:
            case ["GET", "api", "whoami-v2"]:
                return Reply(self._whoami(member))
            case ["POST", "api", "validate-yaml"]:
                errors, warnings, _ = card_problems(data["content"])
                report = {"errors": [{"message": m} for m in errors]}
                report |= {"warnings": [{"message": m} for m in warnings]}
                return Reply(report, 400 if errors else 200)
            case ["POST" | "DELETE", "api", "repos", "create" | "delete" as verb]:
                kind = "" if data.get("type", "model") == "model" else f"{data['type']}s/"
                key = f"{kind}{data.get('organization') or self.user}/{data['name']}"
                if verb == "create":
                    return self._create(key, member, data)
                self._owned(key, member)
                del self.repos[key]
                return Reply({})
            case ["POST", "api", "collections"]:
                slug = f"{data['namespace']}/{data['title'].lower().replace(' ', '-')}-0123456789"
                empty = {"slug": slug, "items": [], "private": data["private"]}
                collection = self.collections.setdefault(slug, {**data, **empty})
                return Reply(_collection(collection))
            case ["POST", "api", "collections", ns, name, "items"]:
                items = self.collections[f"{ns}/{name}"]["items"]
                items += [data["item"]] if data["item"] not in items else []
                return Reply(_collection(self.collections[f"{ns}/{name}"]))
            case ["POST", "_lfs", "verify"]:
                there = len(self.lfs.get(data["oid"], b"")) == data["size"]
                return Reply(status=200 if there else 404)
            case ["POST", *prefix, "info", "lfs", "objects", "batch"]:
                self._owned("/".join(prefix).removesuffix(".git"), member)
                objects = [self._lfs_object(entry) for entry in data["objects"]]
                return Reply({"transfer": "basic", "objects": objects})
            case [_, "api", "models" | "datasets" | "spaces" as kind, ns, name, *rest]:
                key = f"{ns}/{name}" if kind == "models" else f"{kind}/{ns}/{name}"
                if method == "GET" or rest[:1] == ["paths-info"]:
                    return self._read(self._seen(key, member), rest, query, body)
                return self._write(self._owned(key, member), method, rest, data, body)
            case ["GET", "api", "models" | "datasets" | "spaces", _]:
                raise HubError(404 if member else 401, "Repository not found", "RepoNotFound")
        raise HubError(404, f"no such endpoint here: {method} {path}")

    def _mine(self, key: str) -> bool:
        return key.split("/")[-2] in (self.user, *self.orgs)

    def _seen(self, key: str, member: bool) -> Repo:
        repo = self.repos.get(key)
        if repo is None or (repo.private and not (member and self._mine(key))):
            raise HubError(404 if member else 401, "Repository not found", "RepoNotFound")
        return repo

    def _may_write(self, key: str, member: bool) -> None:
        if not member:
            raise HubError(401, "Invalid username or password.")
        if not self._mine(key) or self.role != "write":
            raise HubError(403, f"You don't have the rights to write under {key.split('/')[-2]}")

    def _owned(self, key: str, member: bool) -> Repo:
        repo = self._seen(key, member)
        self._may_write(key, member)
        return repo

    def _whoami(self, member: bool) -> dict:
        if not member:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in self.orgs]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.role}}
        user = {"type": "user", "name": self.user, "fullname": self.user}
        return user | {"orgs": orgs, "auth": auth}

    def _create(self, key: str, member: bool, data: dict) -> Reply:
        self._may_write(key, member)
        url = f"{self.url}/{key}"
        if key in self.repos:
            raise HubError(409, "You already created this repo", url=url)
        visibility = data.get("visibility", "private" if data.get("private") else "public")
        self.add_repo(key, private=visibility == "private")
        return Reply({"url": url, "name": "/".join(key.split("/")[-2:])})

    def _read(self, repo: Repo, rest: list[str], query: dict, body: bytes) -> Reply:
        match rest:
            case [] | ["revision", _]:
                commit = repo.at(rest[1] if rest else "main")
                return Reply(self._info(repo, commit, bool(query.get("blobs"))))
            case ["tree", revision, *folder]:
                top = "".join(f"{part}/" for part in "/".join(folder).split("/") if part)
                deep = query.get("recursive", "").lower() == "true"
                commit = repo.at(revision)
                entries = list_tree(commit.tree, top, deep)
                if top and not entries:
                    raise HubError(404, f"{top} does not exist", "EntryNotFound", "", commit.sha)
                return Reply(entries)
            case ["commits", "main"]:
                fixed = {"message": "", "date": DATE, "authors": []}
                said = [{"id": c.sha, "title": c.message, **fixed} for c in repo.commits]
                return Reply(said[::-1])
            case ["paths-info", revision]:
                entries = list_tree(repo.at(revision).tree, "", True)
                paths = {path.strip("/") for path in parse_qs(body.decode()).get("paths", [])}
                return Reply([entry for entry in entries if entry["path"] in paths])
        raise HubError(404, f"no such endpoint here: GET {rest}")

    def _info(self, repo: Repo, commit: Commit, blobs: bool) -> dict:
        meta = card_problems(commit.tree.get("README.md", Blob(b"", False)).data.decode())[2]
        siblings = [{"rfilename": path} for path in sorted(commit.tree)]
        for sibling in siblings if blobs else []:
            entry = commit.tree[sibling["rfilename"]].info("")
            sibling |= {"size": entry["size"], "blobId": entry["oid"], "lfs": entry.get("lfs")}
        repo_id = "/".join(repo.key.split("/")[-2:])
        info = {"id": repo_id, "author": repo_id.split("/")[0], "sha": commit.sha}
        info |= {"private": repo.private, "gated": repo.key in self.gated and "manual"}
        info |= {"disabled": False, "lastModified": DATE}
        info |= {"createdAt": DATE, "downloads": 0, "likes": 0, "siblings": siblings}
        shown = ("tags", "library_name", "pipeline_tag", "model-index")
        return info | {"cardData": meta} | {key: meta[key] for key in shown if key in meta}

    def _resolve(self, repo: Repo, revision: str, path: str) -> Reply:
        commit = repo.at(revision)
        if repo.key in self.gated:
            message = f"Access to model {repo.key} is restricted and you are not in its list"
            raise HubError(403, message, "GatedRepo", commit=commit.sha)
        if path not in commit.tree:
            raise HubError(404, "Entry not found", "EntryNotFound", commit=commit.sha)
        blob = commit.tree[path]
        etag = f'"{blob.info(path)["oid"]}"'
        headers = {"X-Repo-Commit": commit.sha, "ETag": etag}
        if blob.lfs:
            headers |= {"X-Linked-Size": str(len(blob.data)), "X-Linked-Etag": etag}
        return Reply(blob.data, headers=headers)

    def _write(self, repo: Repo, method: str, rest: list[str], data: dict, body: bytes) -> Reply:
        match [method, *rest]:
            case ["POST", "preupload", revision]:
                tree, files = repo.at(revision).tree, []
                for entry in data["files"]:
                    path, sample = entry["path"], base64.b64decode(entry["sample"])
                    mode = "lfs" if is_lfs(path, sample, entry["size"]) else "regular"
                    oid = tree[path].info("")["oid"] if path in tree else None
                    file = {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}
                    files.append(file)
                return Reply({"files": files})
            case ["POST", "commit", "main"]:
                commit = self._commit(repo, [json.loads(line) for line in body.splitlines()])
                url = f"{self.url}/{repo.key}/commit/{commit.sha}"
                return Reply({"success": True, "commitOid": commit.sha, "commitUrl": url})
            case ["POST", "commit", revision]:
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            case ["POST", "super-squash", "main"]:
                tree, repo.commits = repo.commits[-1].tree, []
                repo.commit(tree, data["message"])
                return Reply({})
            case ["PUT", "settings"]:
                repo.private = data.get("visibility") == "private"
                return Reply({"private": repo.private})
        raise HubError(404, f"no such endpoint here: {method} {rest}")

    def _lfs_object(self, wanted: dict) -> dict:
        got = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.lfs:
            return got  # there already: nothing to upload
        hrefs = {"upload": f"{self.url}/_lfs/{wanted['oid']}", "verify": f"{self.url}/_lfs/verify"}
        return got | {"actions": {action: {"href": href} for action, href in hrefs.items()}}

    def _commit(self, repo: Repo, lines: list[dict]) -> Commit:
        header, tree = lines[0]["value"], dict(repo.commits[-1].tree)
        if header.get("parentCommit", repo.sha) != repo.sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            kind, value = line["key"], line["value"]
            path = value["path"].strip("/")
            if {"..", ".", "", ".git"} & set(path.split("/")):
                raise HubError(400, f"invalid path: {path}")
            if kind == "file":
                tree[path] = Blob(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise HubError(400, f"the LFS object of {path} was not uploaded")
                tree[path] = Blob(self.lfs[value["oid"]], True)
            elif kind == "deletedFile" and path not in tree:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            else:  # deletedFile, deletedFolder
                tree = {p: blob for p, blob in tree.items() if not f"{p}/".startswith(f"{path}/")}
        card = tree.get("README.md", Blob(b"", False)).data.decode()
        if errors := card_problems(card)[0]:
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
        return repo.commit(tree, header["summary"])


def _collection(about: dict) -> dict:
    """What the Hub answers; its items have more keys, which nobody here reads."""
    owner = {"name": about["namespace"], "type": "org"}
    fixed = {"lastUpdated": "2026-01-01T00:00:00.000Z", "position": 0, "theme": "blue"}
    return about | fixed | {"owner": owner, "upvotes": 0, "items": []}


def is_lfs(path: str, sample: bytes, size: int | None = None) -> bool:
    size = len(sample) if size is None else size
    return size > 0 and (path.endswith(LFS) or size > 10 << 20 or b"\0" in sample[:512])


def list_tree(tree: dict[str, Blob], top: str, deep: bool) -> list[dict]:
    entries = {}
    for path, blob in tree.items():
        folders = [str(folder) for folder in PurePosixPath(path).parents if folder.name]
        for folder in folders:
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
        entries[path] = blob.info(path)
    under = [entry for path, entry in sorted(entries.items()) if path.startswith(top)]
    return [entry for entry in under if deep or "/" not in entry["path"][len(top) :]]


def card_problems(text: str) -> tuple[list[str], list[str], dict]:
    """(errors, warnings, metadata) of a README.md; the Hub checks more (licences, model-index)."""
    block = re.match(r"---[ \t]*\r?\n(.*?\n)?---[ \t]*(\r?\n|$)", text, re.S)
    try:
        meta = yaml.safe_load(block[1] or "") if block else None
    except yaml.YAMLError as error:
        return [f"YAML metadata is invalid: {error}"], [], {}
    if meta is None:
        return [], ["empty or missing yaml metadata in repo card"], {}
    if not isinstance(meta, dict):
        return ["YAML metadata must be a mapping"], [], {}
    errors = []
    for key in ("base_model", "datasets"):
        values = meta.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(value)):
                errors.append(f'"{key}" with value "{value}" is not valid. Use an id of the Hub.')
    return errors, [], meta


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self):
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = int(headers.get("content-length", 0))
        if self.hub.hangs_up(self.command, urlsplit(self.path).path):
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if headers.get("transfer-encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        reply = Reply(status=0)
        if not self.hub.closed:
            reply = self.hub.answer(self.command, url.path, query, headers, body)
        if reply.status == -1:
            self.hub.closing.wait(30)
        if reply.status in (0, -1):
            self.close_connection = True
            return
        raw = isinstance(reply.body, bytes)
        content = reply.body if raw else json.dumps(reply.body).encode()
        half = reply.status == -2
        self.send_response(200 if half else reply.status)
        self.send_header("Content-Type", "application/octet-stream" if raw else "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in reply.headers.items():
            self.send_header(name, " ".join(value.split()))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if half else content)
        self.close_connection = self.close_connection or half

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def log_message(self, *_):
        pass


def hub_env(hub: HubServer, tmp_path: Path, token: str | None = "") -> dict[str, str]:
    """The environment of a subprocess that knows this Hub and no other; `token=None`: nobody."""
    alien = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    env = {key: value for key, value in os.environ.items() if not key.upper().startswith(alien)}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf_home")}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    return env if token is None else env | {"HF_TOKEN": token or hub.token}


def turn_to(hub: HubServer, monkeypatch, tmp_path: Path) -> None:
    """This process's own clients, which are offline, turned to this Hub."""
    from huggingface_hub import constants

    for name in list(os.environ):
        if name.upper().startswith(("HF_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
