# SPDX-License-Identifier: Apache-2.0
"""The server of the labelling page: files of the page, and a JSON API on the project's store.

It answers those who know its token (a cookie, set by the address that is printed) or its password.
Host and Origin must be its own, so that no other page in the browser can use it; answers to
requests are never cached or framed. Docs: docs/feedback.md.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_rlhf import extras
from lora_rlhf.data import answer_format
from lora_rlhf.errors import BusyError, LoraRlhfError, UsageError, first_line
from lora_rlhf.runtime.local_server import LOOPBACK, LocalServer, is_loopback, knows_host

from .labels import FLAGS, QUESTIONS
from .project import VERSION, Project
from .store import Assignment, AssignmentError, Store

_NEEDS = ("the labelling page", "feedback")
applications: Any = extras.load("starlette.applications", *_NEEDS)
concurrency: Any = extras.load("starlette.concurrency", *_NEEDS)
requests: Any = extras.load("starlette.requests", *_NEEDS)
responses: Any = extras.load("starlette.responses", *_NEEDS)
routing: Any = extras.load("starlette.routing", *_NEEDS)

PAGE = Path(__file__).with_name("page")
SHORTEST_PASSWORD = 8
LARGEST_BODY = 1_000_000
LONGEST_NAME, LONGEST_GROUP = 80, 200

_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors {ancestors}"
)
_COLAB = re.compile(r"https://[\w.-]+\.(?:colab\.dev|googleusercontent\.com)\Z")
_ANCESTORS = "http://localhost:* http://127.0.0.1:* https://*.google.com https://*.colab.dev"
_WAIT = 0.5  # seconds after a wrong password


@dataclass(frozen=True)
class Access:
    """Address, token and password of a server.

    Args:
        embedded: A notebook shows the page in a frame, so that its cookie is sent from there.
        labeler: Name of the person who opens the address with the token.
    """

    host: str = LOOPBACK
    port: int = 0
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    password: str | None = None
    embedded: bool = False
    labeler: str | None = None

    def __post_init__(self) -> None:
        local = is_loopback(self.host)
        if self.password is None and not local:
            raise UsageError(
                f"{self.host} can be reached from other machines, and there is no password",
                expected=f"{LOOPBACK}, or a password for the labelers",
                remedy="set LORA_RLHF_LABEL_PASSWORD or give --password, or leave --host out and "
                "let labelers come through an SSH tunnel",
            )
        if self.password is not None and len(self.password) < SHORTEST_PASSWORD:
            raise UsageError(
                f"the password has {len(self.password)} characters",
                expected=f"{SHORTEST_PASSWORD} or more",
            )

    def knows_host(self, header: str) -> bool:
        """Return True if the Host of a request is this server, under a name that is ours."""
        shared = self.password is not None
        return knows_host(header, self.host, self.port, shared=shared)

    def knows_origin(self, origin: str, host: str) -> bool:
        """Return True if a request comes from our own page."""
        return origin == f"http://{host}" or (self.embedded and bool(_COLAB.match(origin)))

    def admits(self, cookie: str, authorization: str) -> bool:
        """Return True for the right token or password."""
        if secrets.compare_digest(cookie.encode(), self.token.encode()):
            return True
        scheme, _, given = authorization.partition(" ")
        if self.password is None or scheme.lower() != "basic":
            return False
        try:
            _, _, password = base64.b64decode(given, validate=True).decode().partition(":")
        except ValueError:
            return False
        return secrets.compare_digest(password.encode(), self.password.encode())

    @property
    def cookie(self) -> str:
        """Name of the cookie; browsers share cookies among the ports of a machine."""
        return f"lora-rlhf-label-{self.port}"

    @property
    def named(self) -> str:
        """Name of the cookie with the labeler's pseudonym."""
        return f"{self.cookie}-name"

    def set_cookie(self, answer: Any, name: str, value: str) -> None:
        """Set a cookie for our own page only, or in a notebook's frame too; the value is plain."""
        kind = "SameSite=None; Secure; Partitioned" if self.embedded else "SameSite=Strict"
        answer.headers.append("set-cookie", f"{name}={value}; Path=/; HttpOnly; {kind}")


class _Denied(Exception):
    """A request that gets an error: its HTTP status, a sentence, and what to do."""

    def __init__(self, status: int, error: str, remedy: str = "", code: str = "") -> None:
        super().__init__(error)
        self.status = status
        self.body = {"error": error, "remedy": remedy, "code": code}


class _Guard:
    """ASGI middleware that checks Host, Origin and token, and adds protecting headers."""

    def __init__(self, app: Any, access: Access) -> None:
        self.app, self.access = app, access
        ancestors = _ANCESTORS if access.embedded else "'none'"
        self.headers = [
            (b"content-security-policy", _POLICY.format(ancestors=ancestors).encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"cache-control", b"no-store"),
        ]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.headers]
            await send(message)

        answer = await self._refusal(requests.Request(scope))
        await (answer or self.app)(scope, receive, guarded)

    async def _refusal(self, request: Any) -> Any:
        """Return the answer to a request that is not allowed."""
        access, given = self.access, request.headers
        host, origin = given.get("host", ""), given.get("origin")
        if not access.knows_host(host):
            return _error(403, "this server has another name", "open the address that it printed")
        if origin is not None and not access.knows_origin(origin, host):
            return _error(403, "another page sent this request")
        api = request.url.path.startswith("/api/")
        if api and given.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return _error(403, "another page sent this request")
        if request.url.path == "/" and (token := request.query_params.get("token")):
            if access.admits(token, ""):
                return self._welcome()
            await asyncio.sleep(_WAIT)
        elif access.admits(request.cookies.get(access.cookie, ""), given.get("authorization", "")):
            return None
        if access.password is not None:
            await asyncio.sleep(_WAIT * ("authorization" in given))
            headers = {"www-authenticate": 'Basic realm="labels", charset="UTF-8"'}
            return _error(401, "the password is missing or wrong", headers=headers)
        return _error(
            403,
            "the token is missing or old",
            "open the address that `lora-rlhf label` printed; a restarted server has a new one",
        )

    def _welcome(self) -> Any:
        answer = responses.RedirectResponse("/", status_code=303)
        access = self.access
        access.set_cookie(answer, access.cookie, access.token)
        if access.labeler is not None:
            access.set_cookie(answer, access.named, access.labeler.encode().hex())
        return answer


def _error(status: int, error: str, remedy: str = "", **options: Any) -> Any:
    body = {"error": error, "remedy": remedy, "code": ""}
    return responses.JSONResponse(body, status_code=status, **options)


class _Api:
    """The answers to the page's requests."""

    def __init__(self, project: Project, store: Store) -> None:
        self.project, self.store = project, store

    def state(self, given: dict[str, Any], labeler: str | None) -> dict[str, Any]:
        """Describe the project, the labeler, the guidelines and the progress."""
        settings, guidelines = self.project.settings, self.project.guidelines()
        seen = None if labeler is None else self.store.acknowledged(labeler)
        nothing = {"done": 0, "total": 0, "seconds_median": 0.0}
        return {
            "project": {"name": settings.name, "type": settings.type, "version": VERSION},
            "labeler": labeler,
            "guidelines": {
                "sha256": guidelines.sha256,
                "text": guidelines.text,
                "acknowledged": seen == guidelines.sha256,
            },
            "progress": nothing if labeler is None else self.store.progress(labeler),
            "flags": [*FLAGS],
            "questions": [{"key": key, "text": text} for key, text in QUESTIONS.items()],
        }

    def labeler(self, given: dict[str, Any], labeler: str | None) -> dict[str, Any]:
        """Take a pseudonym, and the group that the person says they belong to, if any."""
        name = _line(given, "name", LONGEST_NAME)
        group = _line(given, "group", LONGEST_GROUP) if given.get("group") else None
        self.store.add_labeler(name, group)
        return {"labeler": name}

    def guidelines(self, given: dict[str, Any], labeler: str | None) -> dict[str, Any]:
        """Take that a labeler read the guidelines."""
        current = self.project.guidelines()
        if given.get("sha256") != current.sha256:
            raise _Denied(
                409, "the guidelines have changed again", "read the new ones", "guidelines"
            )
        self.store.acknowledge(_known(labeler), current.text)
        return {"sha256": current.sha256, "acknowledged": True}

    def next(self, given: dict[str, Any], labeler: str | None) -> dict[str, Any]:
        """Return what the tab shows next."""
        name = _known(labeler)
        if self.store.acknowledged(name) != self.project.guidelines().sha256:
            raise _Denied(
                409, "the guidelines are new or have changed", "read them first", "guidelines"
            )
        assignment = self.store.next_assignment(name, _tab(given))
        shown = {"done": True} if assignment is None else {"assignment": _shown(assignment)}
        return {**shown, "progress": self.store.progress(name)}

    def label(self, given: dict[str, Any], labeler: str | None) -> dict[str, Any]:
        """Save a label, whatever became of the guidelines since its task was shown."""
        return self._submit(given, _known(labeler), given.get("value") or {})

    def skip(self, given: dict[str, Any], labeler: str | None) -> dict[str, Any]:
        """Save that the labeler will not answer."""
        return self._submit(given, _known(labeler), None)

    def _submit(
        self, given: dict[str, Any], labeler: str, value: dict[str, Any] | None
    ) -> dict[str, Any]:
        submission, flags = given.get("submission") or "", given.get("flags") or []
        if not isinstance(submission, str) or len(submission) > 100:
            raise ValueError("submission: expected a short text")
        if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
            raise ValueError("flags: expected a list")
        if not isinstance(note := given.get("note") or "", str):
            raise ValueError("note: expected a text")
        if not isinstance(both_bad := given.get("both_bad") or False, bool):
            raise ValueError("both_bad: expected true or false")
        label = self.store.submit(
            labeler,
            _number(given),
            value,
            tab=_tab(given),
            submission=submission,
            flags=flags,
            both_bad=both_bad,
            note=note,
        )
        return {"label": {"id": label.id}, "progress": self.store.progress(labeler)}

    def undo(self, given: dict[str, Any], labeler: str | None) -> dict[str, Any]:
        """Show the labeler's last task again, with its label."""
        name = _known(labeler)
        assignment = self.store.undo(name, _tab(given))
        return {"assignment": _shown(assignment), "progress": self.store.progress(name)}

    def draft(self, given: dict[str, Any], labeler: str | None) -> dict[str, Any]:
        """Keep what was typed so far."""
        self.store.save_draft(_known(labeler), _number(given), given.get("draft"), tab=_tab(given))
        return {"saved": True}

    def check(self, given: dict[str, Any], labeler: str | None) -> dict[str, Any]:
        """Check the form of a demonstration while it is written."""
        assignment = self.store.assigned(_known(labeler), _number(given))
        if not isinstance(text := given.get("text"), str):
            raise ValueError("text: expected a text")
        return {"problems": answer_format.problems(text, assignment.task.checks or {})}


def _known(labeler: str | None) -> str:
    if labeler is None:
        raise _Denied(409, "nobody has said who labels", "give a name first", "labeler")
    return labeler


def _line(given: dict[str, Any], key: str, longest: int) -> str:
    text = given.get(key)
    if not isinstance(text, str) or not (text := " ".join(text.split())):
        raise ValueError(f"{key}: expected a text")
    if len(text) > longest or not text.isprintable():
        raise ValueError(f"{key}: expected at most {longest} characters on one line")
    return text


def _tab(given: dict[str, Any]) -> str:
    tab = given.get("tab")
    if not isinstance(tab, str) or not 0 < len(tab) <= 100:
        raise ValueError("tab: expected a short text")
    return tab


def _number(given: dict[str, Any]) -> int:
    number = given.get("assignment")
    if not isinstance(number, int) or isinstance(number, bool) or abs(number) > 2**53:
        raise ValueError("assignment: expected the id of an assignment")
    return number


def _shown(assignment: Assignment) -> dict[str, Any]:
    """Return what a labeler may see of a task: neither models nor gold, answers as ordered."""
    task = assignment.task
    return {
        "id": assignment.id,
        "type": task.type,
        "prompt": [dict(turn) for turn in task.prompt],
        "answers": [task.answers[index].text for index in assignment.order],
        "checks": task.checks,
        "draft": assignment.draft,
        "previous": assignment.previous,
    }


async def _body(request: Any) -> dict[str, Any]:
    """Read a JSON object, which must say that it is JSON: other pages cannot without our leave."""
    if request.method == "GET":
        return {}
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise _Denied(400, "the content type is not application/json")
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > LARGEST_BODY:
            raise _Denied(400, f"the request has over {LARGEST_BODY} bytes", "shorten the text")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _Denied(400, f"the request is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise _Denied(400, "the request is not a JSON object")
    return data


def _answered(handle: Callable[[], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """Call a handler; returns the HTTP status and the answer, or the error's sentences."""
    try:
        return 200, handle()
    except _Denied as error:
        return error.status, error.body
    except AssignmentError as error:
        return 409, {"error": error.given, "remedy": error.remedy, "code": error.code}
    except ValueError as error:
        return 400, {"error": first_line(error), "remedy": "", "code": ""}
    except LoraRlhfError as error:  # guidelines or store: the owner has to act
        code = "busy" if isinstance(error, BusyError) else "project"
        where = f"{Path(error.where).name}: " if error.where else ""
        return 503, {"error": f"{where}{error.given}", "remedy": error.remedy, "code": code}


def application(project: Project, store: Store, access: Access) -> Any:
    """Return the ASGI application of a project."""
    api = _Api(project, store)

    def route(name: str, method: str) -> Any:
        handler = getattr(api, name)

        async def endpoint(request: Any) -> Any:
            labeler = _decoded(request.cookies.get(access.named, ""))
            try:
                given = await _body(request)
            except _Denied as error:
                return responses.JSONResponse(error.body, status_code=error.status)
            status, body = await concurrency.run_in_threadpool(
                _answered, lambda: handler(given, labeler)
            )
            answer = responses.JSONResponse(body, status_code=status)
            if name == "labeler" and status == 200:
                access.set_cookie(answer, access.named, body["labeler"].encode().hex())
            return answer

        return routing.Route(f"/api/{name}", endpoint, methods=[method])

    posts = ("labeler", "guidelines", "next", "label", "skip", "undo", "check")
    routes = [route("state", "GET"), route("draft", "PUT"), *(route(n, "POST") for n in posts)]
    routes += [
        routing.Route("/" if path.name == "index.html" else f"/{path.name}", _file(path))
        for path in sorted(PAGE.glob("*"))
        if path.suffix[1:] in _TYPES
    ]
    return _Guard(applications.Starlette(routes=routes), access)


def _decoded(name: str) -> str | None:
    try:
        return bytes.fromhex(name).decode() or None
    except ValueError:
        return None


def _file(path: Path) -> Callable[[Any], Awaitable[Any]]:
    content, kind = path.read_bytes(), _TYPES[path.suffix[1:]]

    async def endpoint(_: Any) -> Any:
        return responses.Response(content, media_type=kind)

    return endpoint


class LabelServer(LocalServer):
    """The labelling page of a project on an open port."""

    def __init__(self, project: Project, access: Access | None = None) -> None:
        access = access or Access()
        self.store = project.store()
        try:
            project.guidelines()
            if access.labeler is not None:
                self.store.add_labeler(access.labeler)
            super().__init__(access.host, access.port, _NEEDS)
        except BaseException:
            self.store.close()
            raise
        self.access = replace(access, port=self.port)
        page = application(project, self.store, self.access)
        self._serves(page, timeout_graceful_shutdown=3)

    @property
    def url(self) -> str:
        """The address to open, with the token."""
        return f"{self.address}?token={self.access.token}"

    def close(self) -> None:
        """Close the store."""
        self.store.close()
