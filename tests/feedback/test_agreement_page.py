# SPDX-License-Identifier: Apache-2.0
"""agreement.html in headless Chromium: it asks for nothing, runs nothing, and fits a phone."""

import headless
import pytest
from simulated_team import team

from lora_rlhf.feedback import label_summary
from lora_rlhf.reports import agreement_report

pytestmark = pytest.mark.browser
NAME = "<script>document.title = 'run'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    habits = ("honest",) * 5 + ("left",)
    made = team(7, each=24, overlap=1.0, per_overlap=4, habits=habits)
    groups = {f"p{i:02}": NAME for i in range(6)}
    given = label_summary.summary(made.tasks, made.labels, groups, made.judge)
    path = tmp_path_factory.mktemp("page") / "agreement.html"
    agreement_report.write({**given, "project": NAME, "created": "2026-01-01T00:00:00Z"}, path)
    return path


@pytest.fixture
def browser(chromium, page):
    with headless.opened(chromium, page) as opened:
        yield opened


def test_hostile_names_are_text(browser):
    assert browser.find_element("css selector", "h1").text == NAME
    assert browser.title == f"Agreement of labelers: {NAME}"
    for tag in ("script", "img"):
        assert not browser.find_elements("css selector", tag)


def test_the_verdict_comes_first_and_its_labeler_is_in_the_table(browser):
    lead = browser.find_element("css selector", "#main .lead").text
    assert lead.startswith("1 of 6 labelers should be looked at")
    [named] = browser.find_elements("css selector", "#main dt")
    rows = browser.find_elements("css selector", "table.overview tbody th")
    assert named.text in [row.text for row in rows] and len(rows) == 6


def test_links_lead_to_sections_and_every_table_has_headings(browser):
    for link in browser.find_elements("css selector", "nav a"):
        target = link.get_attribute("href").partition("#")[2]
        assert len(browser.find_elements("id", target)) == 1
    for table in browser.find_elements("css selector", "table"):
        assert table.find_elements("css selector", "thead th[scope=col]")


@pytest.mark.parametrize("width", [360, 1200])
def test_no_page_is_wider_than_the_screen(browser, width):
    headless.emulate(browser, width=width)
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_in_both_schemes(browser, scheme):
    headless.emulate(browser, scheme)
    for what in ("#main .lead", "table.overview tbody th", "strong.warn"):
        assert headless.contrast(browser, what, "body") >= 4.5
