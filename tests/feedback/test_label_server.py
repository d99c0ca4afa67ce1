# SPDX-License-Identifier: Apache-2.0
"""The label server: who may use it, and what its API answers."""

import base64
import hashlib
import itertools

import httpx
import pytest

from lora_rlhf.errors import SetupError, UsageError
from lora_rlhf.feedback import label_server, project
from lora_rlhf.feedback.label_server import Access, LabelServer
from lora_rlhf.feedback.labels import Answer, Task

SCRIPT = "<script>alert(1)</script>"


def tasks(count=6, kind="ranking", answers=3, **fields):
    for i in range(count):
        prompt = ({"role": "user", "content": f"prompt {i}"},)
        texts = tuple(Answer(f"model-{k}", f"answer {k} {SCRIPT}") for k in range(answers))
        yield Task(f"t{i}", kind, prompt, texts, **fields)


@pytest.fixture
def little(tmp_path, monkeypatch):
    """A project with six rankings, and a page of its own."""
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "index.html").write_text("<!doctype html>")
    (tmp_path / "page" / "label.js").write_text("")
    monkeypatch.setattr(label_server, "PAGE", tmp_path / "page")
    made = project.create(tmp_path / "p", project.Settings(name="little", overlap=0.0))
    with made.store() as store:
        store.add_tasks(tasks())
    return made


@pytest.fixture
def server(little):
    with LabelServer(little) as running:
        yield running


def client(server, labeler=None, **options):
    web = httpx.Client(base_url=server.address, **options)
    assert web.get(f"/?token={server.access.token}").status_code == 303
    if labeler:
        assert web.post("/api/labeler", json={"name": labeler}).status_code == 200
        sha256 = web.get("/api/state").json()["guidelines"]["sha256"]
        assert web.post("/api/guidelines", json={"sha256": sha256}).status_code == 200
    return web


def take(web, tab="tab"):
    return web.post("/api/next", json={"tab": tab}).json()


def give(web, assignment, submission="s", tab="tab", **more):
    body = {"assignment": assignment, "tab": tab, "submission": submission}
    return web.post("/api/label", json={**body, "value": {"ranks": [1, 2, 3]}, **more})


def test_a_sitting(server):
    web = client(server)
    state = web.get("/api/state").json()
    assert (state["labeler"], state["guidelines"]["acknowledged"]) == (None, False)
    assert len(state["questions"]) == 11 and "truthful" in state["guidelines"]["text"].lower()
    assert web.post("/api/next", json={"tab": "a"}).json()["code"] == "labeler"
    web.post("/api/labeler", json={"name": " Anna  B ", "group": "nurse"})
    assert web.post("/api/next", json={"tab": "a"}).json()["code"] == "guidelines"
    sha256 = state["guidelines"]["sha256"]
    assert web.post("/api/guidelines", json={"sha256": "0"}).status_code == 409
    web.post("/api/guidelines", json={"sha256": sha256})
    first = take(web)["assignment"]
    assert {*first} == {"id", "type", "prompt", "answers", "checks", "draft", "previous"}
    assert "model-" not in str(first) and SCRIPT in first["answers"][0]  # text as it is
    assert web.put(
        "/api/draft", json={"assignment": first["id"], "tab": "tab", "draft": [1]}
    ).json()
    assert take(web)["assignment"]["draft"] == [1]
    refused = give(web, first["id"], both_bad="yes")
    assert refused.status_code == 400 and "expected true or false" in refused.text
    done = give(web, first["id"], flags=["harmful"], both_bad=True, note="hm").json()
    assert done["progress"] == {"done": 1, "total": 6, "seconds_median": pytest.approx(0, abs=5)}
    again = web.post("/api/undo", json={"tab": "tab"}).json()["assignment"]
    expected = {"value": {"ranks": [1, 2, 3]}, "flags": ["harmful"], "both_bad": True, "note": "hm"}
    assert again["id"] == first["id"] and again["previous"] == expected
    assert give(web, first["id"], "s2").status_code == 200
    for number in itertools.count():
        if (now := take(web)).get("done"):
            break
        skip = {"assignment": now["assignment"]["id"], "tab": "tab", "submission": f"k{number}"}
        assert web.post("/api/skip", json=skip).status_code == 200
    assert now["progress"]["done"] == 6
    labels = server.store.labels()
    assert [label.labeler for label in labels] == ["Anna B"] * 6
    assert labels[0].guidelines == sha256 and server.store.labelers() == {"Anna B": "nurse"}


def test_a_double_click_and_a_second_tab(server):
    web = client(server, "anna")
    one, two = take(web, "a")["assignment"]["id"], take(web, "b")["assignment"]["id"]
    assert one != two
    answers = [give(web, one, tab="a").json() for _ in range(2)]
    assert answers[0]["label"] == answers[1]["label"]
    assert give(web, one, "other", tab="a").json()["code"] == "answered"
    assert give(web, two, "t", tab="a").json()["code"] == "elsewhere"
    assert give(web, 99, "u", tab="a").json()["code"] == "unknown"
    assert len(server.store.labels()) == 1


def test_a_restarted_server_goes_on(little):
    with LabelServer(little) as server:
        web = client(server, "anna")
        first = take(web)["assignment"]
        port = server.access.port
    with LabelServer(little, Access(port=port)) as server:
        assert take(web) == {
            "error": "the token is missing or old",
            "remedy": "open the address that `lora-rlhf label` printed; a restarted server has a "
            "new one",
            "code": "",
        }
        web.get(f"/?token={server.access.token}")
        assert take(web)["assignment"] == first  # the labeler's cookie is still good
        assert give(web, first["id"]).status_code == 200


def test_guidelines_that_change_or_vanish_while_people_label(server, little):
    web = client(server, "anna")
    first = take(web)["assignment"]["id"]
    path = little.folder / "guidelines.md"
    path.write_text("be brief")  # its version is what sha256sum prints
    assert give(web, first).status_code == 200  # judged by those that were shown
    assert take(web)["code"] == "guidelines"
    new = web.get("/api/state").json()["guidelines"]
    assert (new["text"], new["acknowledged"]) == ("be brief", False)
    assert new["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    web.post("/api/guidelines", json={"sha256": new["sha256"]})
    second = take(web)["assignment"]["id"]
    path.unlink()
    assert give(web, second, "s2").status_code == 200
    answer = web.post("/api/next", json={"tab": "tab"})
    assert answer.status_code == 503
    assert answer.json()["error"].startswith("guidelines.md: the guidelines cannot be read")
    labels = server.store.labels()
    assert labels[0].guidelines != labels[1].guidelines == new["sha256"]
    assert len(server.store.guidelines()) == 2


def test_live_checks(server):
    form = {"max_words": 2}
    [demonstration] = tasks(1, "demonstration", 0, checks=form)
    server.store.add_tasks([Task("d", "demonstration", demonstration.prompt, (), checks=form)])
    web = client(server, "anna")
    for tab in "abcdefg":
        last = take(web, tab)["assignment"]
    assert (last["type"], last["checks"]) == ("demonstration", form)
    for text, problems in (("a b", []), ("a b c", ["3 words, at most 2 are allowed"])):
        answer = web.post("/api/check", json={"assignment": last["id"], "text": text})
        assert answer.json() == {"problems": problems}


# ------------------------------------------------------------------------------- access


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/api/state", {"host": "evil.example"}),
        ("/api/state", {"host": "127.0.0.1:1"}),
        ("/api/state", {"origin": "http://evil.example"}),
        ("/api/state", {"origin": "null"}),
        ("/api/state", {"sec-fetch-site": "cross-site"}),
        ("/api/state", {"cookie": ""}),
        ("/api/state", {"cookie": "lora-rlhf-label-PORT=wrong"}),
        ("/", {"cookie": ""}),
        ("/label.js", {"cookie": ""}),
        ("/?token=wrong", {"cookie": ""}),
    ],
)
def test_strangers_get_403(server, path, headers):
    headers = {k: v.replace("PORT", str(server.access.port)) for k, v in headers.items()}
    web = client(server, "anna")
    answer = web.get(path, headers=headers)
    assert answer.status_code == 403 and answer.json()["error"]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    body = {"tab": "x"}
    if path.startswith("/api"):
        assert web.post("/api/next", json=body, headers=headers).status_code == 403
    own = {"origin": server.address.rstrip("/"), "sec-fetch-site": "same-origin"}
    assert web.post("/api/next", json=body, headers=own).status_code == 200


def test_headers_of_page_and_cookie(server):
    web = client(server)
    answer = httpx.get(server.url)
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    page = web.get("/")
    policy = page.headers["content-security-policy"]
    for part in ("default-src 'none'", "script-src 'self';", "frame-ancestors 'none'"):
        assert part in policy
    assert "unsafe" not in policy and page.headers["cache-control"] == "no-store"
    assert page.headers["content-type"].startswith("text/html")
    assert web.get("/../project.yaml").status_code == web.get("/guidelines.md").status_code == 404


CUT = rb'{"tab": "tab", "assignment": 1, "value": {"ranks": [1, 2, 3]}, "note": "cut \ud83d"}'


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"content": b"{}"}, "not application/json"),
        ({"content": b"[1", "headers": {"content-type": "application/json"}}, "not JSON"),
        ({"content": b"[" * 10**5, "headers": {"content-type": "application/json"}}, "not JSON"),
        ({"json": [1]}, "not a JSON object"),
        ({"json": {"tab": "x" * 10**6}}, "over 1000000 bytes"),
        ({"json": {"tab": 3, "assignment": 1}}, "tab: expected"),
        ({"json": {"tab": "tab", "assignment": 2**80}}, "assignment: expected"),
        ({"json": {"tab": "tab", "assignment": 1, "flags": "harmful"}}, "flags: expected"),
        ({"json": {"tab": "tab", "assignment": 1, "flags": ["rude"]}}, "flag 'rude'"),
        ({"json": {"tab": "tab", "assignment": 1, "note": 1}}, "note: expected"),
        ({"json": {"tab": "tab", "assignment": 1, "value": {"ranks": [1]}}}, "expected 3"),
        ({"content": CUT, "headers": {"content-type": "application/json"}}, "half of a character"),
        ({"json": {"tab": "tab", "assignment": 1, "value": []}}, "ranks None"),
        ({"json": {"tab": "tab", "assignment": 1, "submission": 1}}, "submission: expected"),
    ],
)
def test_a_bad_request_is_one_sentence_and_no_label(server, body, problem):
    web = client(server, "anna")
    take(web)
    answer = web.post("/api/label", **body)
    assert answer.status_code == 400 and problem in answer.json()["error"]
    assert server.store.labels() == []


@pytest.mark.parametrize("name", ["", " ", "x" * 81, "a\u202eb", 3, None])
def test_a_name_is_one_line(server, name):
    answer = client(server).post("/api/labeler", json={"name": name})
    assert answer.status_code == 400 and answer.json()["error"].startswith("name: expected")


def test_other_machines_need_a_password(little, monkeypatch):
    for host in ("0.0.0.0", "::", "192.168.0.1"):
        with pytest.raises(UsageError, match="there is no password"):
            Access(host=host)
    with pytest.raises(UsageError, match="the password has 5 characters"):
        Access(password="short")
    monkeypatch.setattr(label_server, "_WAIT", 0.0)
    with LabelServer(little, Access(host="0.0.0.0", password="correct horse")) as server:
        home = f"http://127.0.0.1:{server.access.port}"

        def status(headers):
            return httpx.get(f"{home}/api/state", headers=headers).status_code

        def basic(password):
            return {
                "authorization": f"Basic {base64.b64encode(f'anna:{password}'.encode()).decode()}"
            }

        assert status({}) == status(basic("wrong horse")) == 401
        assert status({"authorization": "Basic %%%"}) == 401
        assert status(basic("correct horse")) == 200
        near = basic("correct horse") | {"host": f"192.168.0.7:{server.access.port}"}
        assert status(near) == 200
        assert status(near | {"host": f"evil.example:{server.access.port}"}) == 403
        assert status(near | {"origin": "http://evil.example"}) == 403


def test_a_port_in_use_is_one_error(server, little):
    with pytest.raises(SetupError, match=f"port {server.access.port} of 127.0.0.1 cannot be used"):
        LabelServer(little, Access(port=server.access.port))
