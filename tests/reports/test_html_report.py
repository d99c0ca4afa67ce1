# SPDX-License-Identifier: Apache-2.0
"""The page of an evaluation: what its HTML says, holds and leaves out. No browser is needed."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import example_report
import pytest

from lora_rlhf.errors import UsageError
from lora_rlhf.reports import html_report
from lora_rlhf.reports.evaluation_report import Difference, Interval

VOID = {"meta", "link", "input", "br", "line", "circle"}


class Page(HTMLParser):
    """Tags with their text, and tables as (row header, values) by the section they are in."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open, self.rows, self.section = [], {}, [], [], ""
        self.labelled = []  # of each control: a label is around it
        self.feed(text)
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append((tag, len(self.tags) - 1))
        if tag == "section":
            self.section = attributes.get("id") or attributes.get("aria-labelledby", "")
        if tag == "tr":
            self.rows.append((self.section, [], []))
        if tag in ("select", "input"):
            self.labelled.append("label" in [name for name, _ in self.open])
        if tag == "data":
            self.rows[-1][2].append(float(attributes["value"]))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        for tag, number in self.open:
            self.texts[number] = self.texts.get(number, "") + text
            if tag == "th" and attributes_scope(self.tags[number]) == "row":
                self.rows[-1][1].append(text)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag):
        return [self.texts.get(n, "") for n, (name, _) in enumerate(self.tags) if name == tag]

    @property
    def samples(self):
        return json.loads(self.text("script")[0])


def attributes_scope(tag):
    return tag[1].get("scope")


@pytest.fixture(scope="module")
def report():
    return example_report.report()


@pytest.fixture(scope="module")
def text(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    html_report.write(report, path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def render(report, tmp_path):
    return Page(html_report.render(report, tmp_path / "report.json"))


# --- safe ----------------------------------------------------------------------------------------


def test_the_page_asks_for_nothing(page):
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("style", "src", "srcset", "action"), (
                tag
            )
            if name == "href":
                assert value == "data:," or value[0] == "#", value
    assert not re.search(r"url\(|@import|https?:", page.text("style")[0])
    assert not re.search(r"fetch|XMLHttp|import\b|innerHTML|eval\(|https?:", page.text("script")[1])


def test_the_policy_allows_this_script_and_style_alone(page):
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))

    def fingerprint(part):
        return f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"

    assert allowed["default-src"] == "'none'"
    assert allowed["script-src"] == fingerprint(page.text("script")[1])
    assert allowed["style-src"] == fingerprint(page.text("style")[0])
    assert {"base-uri", "form-action"} <= {k for k, v in allowed.items() if v == "'none'"}
    assert [s.get("type") for s in page.all("script")] == ["application/json", None]
    first = [tag for tag, _ in page.tags].index("meta")
    assert page.tags[first + 1][1]["http-equiv"] == "Content-Security-Policy"


NASTY = "</script><script>x()</script><!-- <img src=http://x.org onerror=x()> & \u2028 \x00 \ud800"


def test_foreign_text_stays_text(tmp_path, page):
    report = example_report.report(prompts=8)
    for place in (report["suite"], report["sets"][0], report["judges"][0], report["targets"][0]):
        place["source" if "source" in place else "name"] = NASTY
    for table in report["tables"]:
        table["estimates"][NASTY] = table["estimates"].pop("base")
        table["by_kind"] = {NASTY: {}}
        table["differences"], table["from_clean"] = [], {}
        table["meaning"] = NASTY
    report["costs"] = {}
    report["verdict"] = [NASTY]
    report["headline"]["sentence"] = report["not_measured"][0]["why"] = NASTY
    for sample in report["samples"]:
        sample["prompt"] = sample["id"] = sample["kind"] = sample["why"] = NASTY
        answers = sample["answers"]
        answers[NASTY] = answers.pop("base", answers["sft"]) | {"text": NASTY}
    nasty = render(report, tmp_path)
    assert len(nasty.all("script")) == 2 and not nasty.all("img")
    assert nasty.text("script")[1] == page.text("script")[1]
    row = nasty.samples["rows"][0]
    assert row[1:5] == [NASTY] * 4 and row[6][0][0] == NASTY


def test_secrets_are_masked(tmp_path):
    report = example_report.report(prompts=8)
    secret = "hf_" + "a1" * 20
    report["samples"][0]["prompt"] = report["verdict"][0] = f"use {secret}"
    assert secret not in html_report.render(report, tmp_path / "report.json")


# --- true ----------------------------------------------------------------------------------------


def numbers(*estimates):
    return [e[key] for e in estimates if e for key in ("value", "low", "high")]


def test_every_number_is_that_of_the_report(report, page):
    for number, table in enumerate(report["tables"], 1):
        shown = {
            "".join(head): values for where, head, values in page.rows if where == f"m{number}"
        }
        for name, estimate in table["estimates"].items():
            assert shown[name] == numbers(estimate)
        for d in table["differences"]:
            assert shown[f"{d['a']} − {d['b']}"] == numbers(d["estimate"])
        for name, estimate in table.get("from_clean", {}).items():
            assert shown[f"{name}: changed − clean"] == numbers(estimate)
        for kind, row in table["by_kind"].items():
            pairs = [d["by_kind"][kind] for d in table["differences"]]
            assert shown[kind] == numbers(*row.values(), *pairs)
        overview = [values for where, head, values in page.rows
                    if where == "results" and head and head[0] == table["metric"]]  # fmt: skip
        assert overview == [numbers(*table["estimates"].values())]
    costs = {"".join(h): values for where, h, values in page.rows if where == "cost" and h}
    assert costs == {
        n: [x for x in c.values() if x is not None] for n, c in report["costs"].items()
    }


def test_samples_are_those_of_the_report(report, page):
    data = page.samples
    assert data["start"] == ["closed-world", "gold_reward"] and data["model"] == "policy"
    assert data["better"]["invented"] == "lower" and data["better"]["length"] == "neither"
    for sample, row in zip(report["samples"], data["rows"], strict=True):
        assert row[:6] == [sample[k] for k in ("set", "id", "kind", "why", "prompt")] + [0]
        for name, packed in zip(data["targets"], row[6], strict=True):
            answer = sample["answers"].get(name)
            if answer is None:
                assert packed == 0
                continue
            assert packed[:4] == [answer["text"], 0, answer["tokens"], answer["finished"]]
            metrics = data["metrics"][sample["set"]]
            assert dict(zip(metrics, packed[4], strict=True)) == answer["values"]


def test_the_page_says_what_the_report_says(report, page):
    (body,) = page.text("body")
    assert page.text("p").count(report["headline"]["sentence"]) == 1  # once, not again in the list
    for place in (report["verdict"], *(j.values() for j in report["judges"])):
        for said in (x for x in place if isinstance(x, str)):
            assert said in body
    for said in (
        *("Toxic continuations", "The detector is not installed.", "not trusted"),
        *("0.550 [0.470, 0.630] (n = 150)", "by category, harmless", "suites/quick.yaml"),
        *(
            "policy is worse",
            "an answer padded with empty sentences",
            "0.70 [0.60, 0.80] (n = 100)",
        ),
    ):
        assert said in body
    assert "<script>" not in page.text("main")[0]


def test_an_empty_report_says_so(tmp_path):
    report = example_report.report(prompts=8)
    report |= {"headline": None, "verdict": [], "tables": [], "samples": [], "judges": [],
               "costs": {}, "not_measured": []}  # fmt: skip
    (body,) = render(report, tmp_path).text("body")
    for said in (
        *("has no headline", "No metric was measured", "No judge was used"),
        *("Cost was not measured", "Everything that the suite names was measured"),
    ):
        assert said in body


def test_another_version_is_refused(tmp_path, report):
    with pytest.raises(UsageError, match="version 2") as caught:
        html_report.write(report | {"version": 2}, tmp_path / "report.html")
    assert str(tmp_path / "report.json") in str(caught.value)
    assert not list(tmp_path.iterdir())


def interval(value, low, high):
    return Interval(value=value, low=low, high=high, n=9)


@pytest.mark.parametrize(
    ("ends", "better", "said"),
    [((0.2, 0.1, 0.3), "higher", "a is better"), ((0.2, 0.1, 0.3), "lower", "a is worse"),
     ((-0.2, -0.3, -0.1), "higher", "a is worse"), ((-0.2, -0.3, -0.1), "lower", "a is better"),
     ((0.2, 0.1, 0.3), "neither", "a is higher"), ((-2, -3, -1), "neither", "a is lower"),
     ((0.1, 0.0, 0.2), "higher", "no difference shown"),
     ((0, -1, 1), "lower", "no difference shown"),
     ((0.1, None, None), "higher", "not known"), (None, "higher", "not known")],
)  # fmt: skip
def test_readings_rest_on_the_interval_of_the_difference(ends, better, said):
    estimate = interval(*ends) if ends else None
    difference = Difference(a="a", b="b", estimate=estimate, by_kind={})
    assert html_report.reading(difference, better) == said


@pytest.mark.parametrize(
    ("ends", "said"),
    [((0.6234, 0.581, 0.664), ("0.623", "0.581", "0.664")),
     ((0.62, 0.3, 0.9), ("0.62", "0.30", "0.90")), ((250.4, 120, 400), ("250", "120", "400")),
     ((1234.5, 1000, 1500), ("1,234", "1,000", "1,500")),
     ((-0.2, -0.3, -0.1), ("−0.20", "−0.30", "−0.10")),
     ((0.2, -0.004, 0.4), ("0.200", "−0.004", "0.400")),
     ((0.5, 0.5, 0.5), ("0.500", "0.500", "0.500")), ((12345.678, None, None), ("12,346", "", ""))],
)  # fmt: skip
def test_numbers_have_as_many_digits_as_their_interval_bears(ends, said):
    assert html_report.shown(interval(*ends)) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (1, "1"), (None, "–"), (0.0001234, "0.0001234"), (-0.5, "−0.5"), (64, "64"),
     (1048576, "1,048,576"), (210.5, "210.5"), (1e-30, "0")],
)  # fmt: skip
def test_plain_numbers(value, said):
    assert html_report.plain(value) == said


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    ("low", "high"),
    [(0.31, 0.62), (0, 1), (-3e-7, 5e-7), (1e9, 3e9), (5, 5), (0, 0), (-1, -0.999), (0.1, 0.2)],
)
def test_an_axis_holds_its_intervals(low, high, zero):
    axis = html_report.Axis.of([None, interval((low + high) / 2, low, high)], zero)
    assert axis.low <= low and axis.high >= high
    assert not zero or axis.low <= 0 <= axis.high
    assert 2 <= len(axis.ticks) <= 6 and list(axis.ticks) == sorted(set(axis.ticks))
    assert (axis.x(axis.low), axis.x(axis.high)) == (16, html_report.WIDTH - 16)
    assert html_report.Axis.of([None]) is None


def test_plots_stand_where_the_numbers_are(report, page):
    """Dots of one table keep the ratio of the distances between its values."""
    drawn = [float(circle["cx"]) for circle in page.all("circle")][:3]
    base, sft, policy = (
        report["tables"][0]["estimates"][name]["value"] for name in example_report.TARGETS
    )
    assert (drawn[2] - drawn[0]) / (drawn[1] - drawn[0]) == pytest.approx(
        (policy - base) / (sft - base), rel=0.02
    )


# --- small ---------------------------------------------------------------------------------------


def test_512_prompts_and_three_models_fit_whole(tmp_path):
    report = example_report.report(512, words=150, metrics=[f"metric_{i}" for i in range(10)])
    text = html_report.render(report, tmp_path / "report.json")
    assert len(text.encode()) < html_report.LARGEST
    page = Page(text)
    assert (
        len(page.samples["rows"]) == 512 and "To keep this page under" not in page.text("main")[0]
    )


def test_what_does_not_fit_is_cut_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(html_report, "LARGEST", 400_000)
    report = example_report.report(64, words=400)
    text = html_report.render(report, tmp_path / "report.json")
    page = Page(text)
    assert len(text.encode()) <= 400_000
    assert "texts of more than 1,000 characters are cut there. report.json" in page.text("main")[0]
    answer = report["samples"][0]["answers"]["policy"]["text"]
    assert page.samples["rows"][0][6][2][:2] == [answer[:1000], len(answer) - 1000]


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_the_worst_answers_stay(tmp_path, monkeypatch, better):
    monkeypatch.setattr(html_report, "LARGEST", 140_000)
    report = example_report.report(128, words=150)
    report["tables"][0]["better"] = better
    text = html_report.render(report, tmp_path / "report.json")
    page = Page(text)
    kept = {row[1] for row in page.samples["rows"] if row[0] == "closed-world"}
    assert len(text.encode()) <= 140_000 and 10 < len(kept) < 96
    absent = 128 - len(page.samples["rows"])
    assert f"{absent} of 128 prompts are left out" in page.text("main")[0]
    sign = 1 if better == "higher" else -1
    badness = {
        s["id"]: sign * s["answers"]["policy"]["values"]["gold_reward"]
        for s in report["samples"]
        if s["set"] == "closed-world"
        and s["answers"]["policy"]["values"]["gold_reward"] is not None
    }
    assert kept == set(sorted(badness, key=badness.get)[: len(kept)])


# --- for everybody -------------------------------------------------------------------------------


def test_a_screen_reader_finds_its_way(page):
    assert page.all("html") == [{"lang": "en"}] and page.text("title")[0]
    assert [len(page.all(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in zip([0, *levels], levels, strict=False))
    assert all(cell["scope"] in ("col", "row", "rowgroup") for cell in page.all("th"))
    assert all(svg["aria-hidden"] == "true" for svg in page.all("svg"))  # the table has the numbers
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    links = [a["href"][1:] for a in page.all("a")]
    labels = [a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a]
    assert {*links, *labels} <= set(ids)
    assert page.labelled == [True] * 7
