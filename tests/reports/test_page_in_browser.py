# SPDX-License-Identifier: Apache-2.0
"""report.html in headless Chromium: it sorts, filters, makes no request, runs nothing foreign."""

from pathlib import Path

import example_report
import headless
import pytest

from lora_rlhf.reports import html_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def report():
    return example_report.report()


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    html_report.write(report, path)
    return path


@pytest.fixture
def browser(chromium, page):
    with headless.opened(chromium, page) as opened:
        yield opened


def select(browser, name, value):
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", name)).select_by_value(value)


def texts(browser, where):
    return [element.text for element in browser.find_elements("css selector", where)]


def listed(browser):
    """Ids of the samples on the page, in order, with all of them shown."""
    more = browser.find_element("id", "more")
    while more.is_displayed():
        browser.execute_script("arguments[0].click()", more)
    return browser.execute_script(
        "return [...document.querySelectorAll('.sample h3')].map((h) => h.firstChild.data)"
    )


def values(report, metric, model="policy", where="closed-world"):
    rows = {s["id"]: s["answers"].get(model) for s in report["samples"] if s["set"] == where}
    return {row: answer and answer["values"][metric] for row, answer in rows.items()}


def test_it_opens_on_the_worst_answers(browser, report):
    assert browser.title == "Evaluation of base, sft, policy: quick"
    by_id = values(report, "gold_reward")
    known = sorted((row for row in by_id if by_id[row] is not None), key=by_id.get)
    assert texts(browser, "#count") == ["20 of 48 prompts shown, of 64 on this page."]
    first = browser.find_element("css selector", ".sample")
    assert first.find_element("css selector", ".why").text.startswith(
        f"gold_reward of policy is −{-by_id[known[0]]:.4g}: the worst of 47 prompts."
    )
    assert len(first.find_elements("css selector", ".answer")) == 3
    assert listed(browser) == [*known, "row-2"]  # the undecided one is last


def test_orders(browser, report):
    by_id = values(report, "gold_reward")
    known = sorted((row for row in by_id if by_id[row] is not None), key=by_id.get)
    select(browser, "order", "best")
    assert listed(browser) == [*known[::-1], "row-2"]
    select(browser, "order", "report")
    assert listed(browser) == list(by_id)
    select(browser, "order", "gap")
    models = [values(report, "gold_reward", model) for model in example_report.TARGETS]

    def spread(row):
        numbers = [model[row] for model in models if model[row] is not None]
        return max(numbers) - min(numbers)

    assert listed(browser) == sorted(by_id, key=spread, reverse=True)


def test_lower_is_better_where_the_metric_says_so(browser, report):
    select(browser, "metric", "invented")
    by_id = values(report, "invented")
    order = [by_id[row] for row in listed(browser)]
    assert order == sorted(order, reverse=True) and set(order) == {0, 1}
    some = sum(by_id.values())
    assert f"the worst value, as on {some:.0f} of 48 prompts" in texts(browser, ".why")[0]


def test_filters(browser, report):
    mine, other, base = (values(report, "correct", name) for name in ("policy", "sft", "base"))
    select(browser, "metric", "correct")
    select(browser, "outcome", "worse")
    expected = {row for row in mine if mine[row] < max(other[row], base[row] or 0)}
    assert set(listed(browser)) == expected
    select(browser, "outcome", "none")
    assert listed(browser) == ["row-3"]  # base gave no answer
    select(browser, "outcome", "")
    select(browser, "kind", "harmful")
    kinds = {
        s["id"] for s in report["samples"] if s["set"] == "closed-world" and s["kind"] == "harmful"
    }
    assert set(listed(browser)) == kinds
    select(browser, "set", "truth")
    assert len(listed(browser)) == 16
    select(browser, "set", "")
    assert len(listed(browser)) == 64


def test_text_search_is_plain_and_marks_what_it_finds(browser, report):
    field = browser.find_element("id", "text")
    field.send_keys("QUESTION 7.")  # in prompts, whatever the case; the dot is a dot
    assert listed(browser) == ["row-7"]
    assert texts(browser, "mark") == ["Question 7."]
    field.send_keys(" nowhere\n")
    assert listed(browser) == []
    assert texts(browser, "#count") == ["No prompt matches these filters."]


def test_models_can_be_hidden(browser):
    browser.find_elements("css selector", "#models input")[0].click()
    assert texts(browser, ".sample:first-child .answer h4") == ["sft", "policy"]


def test_a_script_in_an_answer_is_text(browser):
    browser.find_element("id", "text").send_keys("document.title")
    assert listed(browser) == ["row-1"]
    assert texts(browser, ".answer:last-child .text") == [example_report.SCRIPT]
    assert "judges disagree most here" in texts(browser, ".why")[0]
    assert browser.title.startswith("Evaluation")
    assert not browser.find_elements("css selector", "main script")


def test_tables_sort_by_their_numbers_from_the_keyboard(browser, report):
    from selenium.webdriver.common.keys import Keys

    def column(number):
        rows = "[aria-labelledby=cost] tbody tr"
        return texts(browser, f"{rows} > :nth-child({number})")

    price = browser.find_elements("css selector", "[aria-labelledby=cost] thead button")[5]
    price.send_keys(Keys.ENTER)
    assert column(6) == ["0.12", "–\nnot measured", "–\nnot measured"]
    price.send_keys(Keys.ENTER)
    assert column(6) == [
        "0.12",
        "–\nnot measured",
        "–\nnot measured",
    ]  # what was not measured stays last
    speed = browser.find_elements("css selector", "[aria-labelledby=cost] thead button")[3]
    speed.send_keys(Keys.SPACE)
    assert column(1) == ["policy", "sft", "base"]
    heads = browser.find_elements("css selector", "[aria-labelledby=cost] th[scope=col]")
    assert [head.get_attribute("aria-sort") for head in heads] == [None] * 3 + ["ascending"] + [
        None
    ] * 2


def test_focus_is_seen_and_begins_with_the_way_past_the_links(browser):
    from selenium.webdriver.common.keys import Keys

    browser.find_element("css selector", "body").send_keys(Keys.TAB)
    focused = browser.switch_to.active_element
    assert focused.text == "Skip to the verdict" and focused.is_displayed()
    assert focused.value_of_css_property("outline-style") == "solid"
    focused.send_keys(Keys.ENTER)
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.text == "gold_reward"  # the first link of the results


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_light_and_dark(browser, scheme):
    headless.emulate(browser, scheme)
    assert (headless.luminance(browser, "body", "background-color") > 0.5) == (scheme == "light")
    for what in ("body", ".interval", ".warn", ".good", "td a, th a", ".sample .why"):
        assert headless.contrast(browser, what, "body") >= 4.5, what  # WCAG AA


def test_a_narrow_screen_needs_no_sideways_scrolling(browser):
    headless.emulate(browser, width=400)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    answers = browser.find_elements("css selector", ".sample:first-child .answer")
    assert len({answer.rect["x"] for answer in answers}) == 1  # below each other


def test_closed_tables_are_printed(browser):
    table = browser.find_element("css selector", "details table")
    visible = "return arguments[0].checkVisibility()"
    assert not browser.execute_script(visible, table)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script(visible, table)


def test_the_policy_stops_a_script_that_got_in(chromium, page, tmp_path):
    text = page.read_text(encoding="utf-8").replace(
        "<footer>", f"<footer>{example_report.SCRIPT}<img src='https://example.org/x.png'>"
    )
    Path(tmp_path / "report.html").write_text(text, encoding="utf-8")
    chromium.get((tmp_path / "report.html").as_uri())
    assert chromium.title.startswith("Evaluation")
    blocked = [entry["message"] for entry in chromium.get_log("browser")]
    assert len(blocked) == 2 and all("Content Security Policy" in message for message in blocked)
    assert len(listed(chromium)) == 48  # the page's own script runs
