# SPDX-License-Identifier: Apache-2.0
"""The labelling page in headless Chromium: sittings, accidents, hostile text, accessibility."""

import contextlib
import functools
import http.server
import threading
import time
from urllib.parse import urlsplit

import headless
import pytest
from label_sitting import Sitting, task

from lora_rlhf.feedback import store

pytestmark = pytest.mark.browser

ANSWERS = ("Boil the water first.", "Tea is a drink.", "No.", "Ask someone else.")
RANKING = task("ranking", "How do I make tea?", *ANSWERS)
PAIR = task("pair", "Why does the moon change?", "The sun lights one side of it.", "It does not.")
RATING = task("rating", "Write a wish for my aunt.", "All the best, dear aunt!")
WRITING = task("demonstration", "The meeting is on Thursday. Say so.", checks={"max_words": 5})


class Page:
    """What a person does in the browser, and what they see."""

    def __init__(self, browser, sitting):
        self.browser, self.sitting = browser, sitting
        self.errors = 0  # of the console, that a test provokes
        self.origins = {urlsplit(sitting.url)[:2]}

    def open(self):
        self.browser.get(self.sitting.url)
        return self

    def begin(self):
        """Open the page, give a pseudonym and accept the guidelines."""
        self.open().sees("Who labels?")
        self.type("heron\n").sees("Guidelines")
        self.find("#acknowledge").click()
        return self

    def find(self, where):
        return self.browser.find_element("css selector", where)

    def all(self, where):
        return self.browser.find_elements("css selector", where)

    def text(self, where):
        return self.find(where).text

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def type(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser, duration=0).send_keys(*keys).perform()
        return self

    def insert_at(self, rank):
        """Press Shift and a digit."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        keys = ActionChains(self.browser, duration=0).key_down(Keys.SHIFT).send_keys(str(rank))
        keys.key_up(Keys.SHIFT).perform()
        return self

    def until(self, condition, what="", seconds=10.0):
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(StaleElementReferenceException):  # the view changes
                if condition():
                    return
            assert time.monotonic() < end, f"{what or condition}: {self.text('body')[:800]}"
            time.sleep(0.02)

    def sees(self, heading):
        """Wait for a new view; a task takes a moment until it can be saved."""
        script = "return document.querySelector('h1')?.textContent"
        self.until(lambda: self.run(script) == heading, f"heading {heading!r}")
        if self.run("return !document.getElementById('bar').hidden"):
            time.sleep(0.27)
        return self

    def says(self, text, where="#message"):
        shown = "return document.querySelector(arguments[0])?.textContent ?? ''"
        self.until(lambda: text in self.run(shown, where), f"{text!r} in {where}")
        return self

    def pick(self, name, value):
        """Choose a radio button or check a box, as by mouse or touch."""
        return self.click(f"input[name='{name}'][value='{value}']")

    def click(self, where):
        """Click in the middle of the screen, where the bar at the bottom covers nothing."""
        element = self.find(where)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()
        return self

    def save(self, then):
        self.find("#save").click()
        self.sees(then)
        writes = then.startswith("Write")
        assert not self.text("#message")
        assert self.focused().tag_name == ("textarea" if writes else "h1")
        return self

    def focused(self):
        return self.browser.switch_to.active_element


@pytest.fixture
def page(chromium, tmp_path):
    """Begin a sitting with the tasks of a test; afterwards no request left the server's origin."""
    pages = []
    first = chromium.current_window_handle

    def sitting(*tasks, **options):
        pages.append(Page(chromium, Sitting(tmp_path / "project", tasks, **options)))
        return pages[0]

    chromium.delete_all_cookies()
    for log in ("performance", "browser"):
        chromium.get_log(log)
    yield sitting
    for handle in chromium.window_handles:
        if handle != first:
            chromium.switch_to.window(handle)
            chromium.close()
    chromium.switch_to.window(first)
    headless.emulate(chromium)
    origins = {urlsplit(url)[:2] for url in headless.requests(chromium)}
    complaints = chromium.get_log("browser")
    chromium.get("about:blank")
    pages[0].sitting.kill()
    origins = {origin for origin in origins if origin[0] not in ("data", "about")}
    assert origins == pages[0].origins
    assert len(complaints) <= pages[0].errors, complaints


# ------------------------------------------------------------------------ each type of label


def test_a_ranking_with_ties(page):
    sitting = page(RANKING).begin().sees("Rank these 4 answers")
    shown = [card.text for card in sitting.all(".answer .text")]
    assert sorted(shown) == sorted(ANSWERS)
    sitting.find("#save").click()
    sitting.says("No rank yet: answers A, B, C and D.")
    for place, rank in enumerate((2, 4, 1, 4)):
        sitting.pick(f"rank-{place}", rank)
    assert sitting.text("#order").split("\n") == ["C", "A", "B = D"]
    sitting.pick("flag", "personal_data").find("#note").send_keys("D names a person")
    sitting.save("Nothing left to label here")
    [label] = sitting.sitting.labels()
    assert [label.value["ranks"][ANSWERS.index(text)] for text in shown] == [2, 3, 1, 3]
    assert (label.flags, label.note) == (("personal_data",), "D names a person")
    assert label.labeler == "heron" and not label.both_bad and label.replaces is None
    assert sitting.text("#count") == "1 of 1"


def test_fewest_and_most_answers(page):
    from selenium.webdriver.common.keys import Keys

    answers = [f"This is answer {i}." for i in range(9)]
    sitting = page(*(task("ranking", "?", *answers[:n]) for n in (2, 9))).begin()
    shown = []
    for n, then in ((2, "Rank these 9 answers"), (9, "Nothing left to label here")):
        sitting.sees(f"Rank these {n} answers")
        shown.append([card.text for card in sitting.all(".answer .text")])
        if n == 2:
            sitting.type("21")
        else:  # each one better than those before
            for _ in range(n):
                sitting.insert_at(1)
            sitting.type(Keys.ARROW_LEFT).insert_at(3)
            assert sitting.text("#order").split("\n") == [*"HGIFEDCBA"]
        sitting.save(then)
    for label, texts in zip(sitting.sitting.labels(), shown, strict=True):
        ranks = [label.value["ranks"][answers.index(text)] for text in texts]
        assert ranks == ([2, 1] if len(texts) == 2 else [9, 8, 7, 6, 5, 4, 2, 1, 3])


def test_pairs_with_strength(page):
    sitting = page(PAIR, task("pair", "Second?", "x", "y")).begin()
    sitting.sees("Which answer is better?")
    first = sitting.text(".answer .text")
    sitting.find("#save").click()
    sitting.says("Choose which answer is better first.")
    sitting.pick("strength", -3).save("Which answer is better?")
    sitting.until(lambda: sitting.text(".prompt .text") == "Second?")
    sitting.click("#both-bad")
    sitting.save("Nothing left to label here")
    strong, bad = sitting.sitting.labels()
    better = first == "The sun lights one side of it."
    assert strong.value == {"strength": -3 if better else 3}
    assert bad.value == {"strength": 0} and bad.both_bad


def test_the_table_of_instructgpt(page):
    sitting = page(RATING).begin().sees("Rate this answer")
    questions = [legend.text for legend in sitting.all(".question legend")]
    assert len(questions) == 11
    sitting.find("#save").click()
    sitting.says("Choose the overall quality first.")
    sitting.pick("overall", 6).pick("question-opinion", "true")
    sitting.find("#save").click()
    sitting.says("Answer every question first: 10 left.")
    sitting.click("#rest")
    sitting.save("Nothing left to label here")
    [label] = sitting.sitting.labels()
    assert label.value["overall"] == 6 and len(label.value["questions"]) == 11
    assert [key for key, yes in label.value["questions"].items() if yes] == ["opinion"]


def test_a_demonstration_is_checked_while_it_is_written(page):
    sitting = page(WRITING).begin().sees("Write the best answer")
    assert sitting.text("#wanted") == "Wanted: at most 5 words."
    area = sitting.find("#text")
    area.send_keys("The meeting will be on Thursday.")
    sitting.says("6 words, at most 5", "#problems").says("6 words, 32 characters", "#counts")
    sitting.find("#save").click()
    sitting.says("Not yet in the wanted form")
    area.clear()
    area.send_keys("We meet on Thursday.")
    sitting.says("In the wanted form", "#problems").save("Nothing left to label here")
    assert [label.value for label in sitting.sitting.labels()] == [{"text": "We meet on Thursday."}]


def test_skip_and_undo(page):
    sitting = page(PAIR, WRITING).begin().sees("Which answer is better?")
    sitting.pick("flag", "broken").find("#skip").click()
    sitting.sees("Write the best answer").find("#text").send_keys("Thursday!")
    sitting.find("#undo").click()
    sitting.sees("Which answer is better?")
    assert "The earlier one stays on record" in sitting.text("#changing")
    assert sitting.find("input[value=broken]").is_selected()
    sitting.pick("strength", 0).save("Write the best answer")
    assert sitting.find("#text").get_property("value") == "Thursday!"
    skipped, changed = sitting.sitting.labels(current=False)
    assert skipped.value is None and skipped.flags == ("broken",)
    assert changed.value == {"strength": 0} and changed.replaces == skipped.id


def test_a_whole_sitting_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    sitting = page(RANKING, PAIR, RATING, WRITING).open().sees("Who labels?")
    sitting.type("heron", Keys.ENTER).sees("Guidelines")
    while sitting.focused().get_attribute("id") != "acknowledge":
        sitting.type(Keys.TAB)
    sitting.type(Keys.ENTER).sees("Rank these 4 answers")
    shown = [card.text for card in sitting.all(".answer .text")]
    sitting.type("32", Keys.ARROW_LEFT, "1", "24")  # changes its mind on the second answer
    assert sitting.text("#order").split("\n") == ["B", "C", "A", "D"]
    sitting.type(Keys.ARROW_LEFT)  # from Save: to the last answer
    assert sitting.focused().get_attribute("id") == "answer-3"
    sitting.type("2", "f", Keys.SPACE, "t", "a note", Keys.ESCAPE, Keys.ENTER)
    sitting.sees("Which answer is better?").type("6", Keys.ARROW_LEFT, "b", Keys.ENTER)
    sitting.sees("Rate this answer").type("5", "ynnnnnnnnny")
    assert sitting.focused().get_attribute("id") == "save"
    sitting.type(Keys.ENTER).sees("Write the best answer")
    sitting.type("On Thursday.").says("In the wanted form", "#problems")
    sitting.browser.switch_to.active_element.send_keys(Keys.CONTROL, Keys.ENTER)
    sitting.sees("Nothing left to label here")
    ranking, pair, rating, written = sitting.sitting.labels()
    assert [ranking.value["ranks"][ANSWERS.index(text)] for text in shown] == [4, 1, 2, 2]
    assert ranking.flags == ("harmful",) and ranking.note == "a note"
    assert abs(pair.value["strength"]) == 1 and pair.both_bad
    assert sum(rating.value["questions"].values()) == 2
    assert written.value == {"text": "On Thursday."}


def test_help_and_guidelines_are_one_key_away(page):
    from selenium.webdriver.common.keys import Keys

    sitting = page(PAIR).begin().sees("Which answer is better?").type("?")
    assert "from A much better to B much better" in sitting.text("#help-keys")
    sitting.find("#help button").click()
    sitting.type("g")
    assert sitting.find("#guidelines").is_displayed() and sitting.text("#guidelines-text")
    sitting.type("g")
    assert not sitting.find("#guidelines").is_displayed()
    sitting.type("?")
    sitting.find("#keys-on").click()
    sitting.type(Keys.ESCAPE, "g", "7")  # single keys are off
    assert not sitting.all("dialog[open]") and not sitting.all("input[name=strength]:checked")


def test_changed_guidelines_are_shown_again(page):
    from selenium.webdriver.common.keys import Keys

    sitting = page(PAIR, WRITING, guidelines="# Ours\n\n- Be *kind*.\n").begin()
    sitting.sees("Which answer is better?").type("4")
    sitting.sitting.write_guidelines("# Ours\n\n- Be *kind*.\n- Be **brief**. <b>x</b>\n")
    sitting.save("The guidelines have changed")
    assert [new.text for new in sitting.all(".new")] == ["Be brief. <b>x</b>"]
    sitting.find("#acknowledge").click()
    sitting.sees("Write the best answer").type("g is written", Keys.ESCAPE, "g")
    assert sitting.find("#text").get_property("value") == "g is written"
    assert "Be brief." in sitting.text("#guidelines-text")
    assert len(sitting.sitting.labels()) == 1


def test_guidelines_in_markdown(page):
    source = (
        "# A\nfirst\nline\n## B\n1. one\n2. two\n   goes on\n- *x* `y`\n  - z\n\n> said\n\n"
        "|h|i|\n|-|-|\n|1|**2**|\n\n<!-- gone -->\n"
        "[us](https://example.org/a) [no](javascript:alert(1)) <i>i</i>\n"
    )
    sitting = page(PAIR, guidelines=source).begin().sees("Which answer is better?").type("g")
    html = sitting.find("#guidelines-text > div").get_property("innerHTML")
    assert html == (
        "<h2>A</h2><p>first line</p><h3>B</h3><ol><li>one</li><li>two goes on</li></ol>"
        "<ul><li><em>x</em> <code>y</code></li><li>z</li></ul><blockquote>said</blockquote>"
        "<table><tr><th>h</th><th>i</th></tr><tr><td>1</td><td><strong>2</strong></td></tr></table>"
        '<p><a href="https://example.org/a" target="_blank" rel="noopener noreferrer">us</a> '
        "[no](javascript:alert(1)) &lt;i&gt;i&lt;/i&gt;</p>"
    )


# ---------------------------------------------------------------------------------- accidents


def test_a_double_click_gives_one_label(page):
    from selenium.webdriver.common.action_chains import ActionChains

    sitting = page(PAIR, task("pair", "Second?", "x", "y")).begin().sees("Which answer is better?")
    sitting.pick("strength", 1)
    ActionChains(sitting.browser).double_click(sitting.find("#save")).perform()
    sitting.until(lambda: sitting.text(".prompt .text") == "Second?")
    sitting.sees("Which answer is better?")
    assert len(sitting.sitting.labels(current=False)) == 1


def test_a_reload_keeps_everything(page):
    sitting = page(RANKING, WRITING).begin().sees("Rank these 4 answers")
    sitting.type("31").find("#note").send_keys("why")
    shown = [card.text for card in sitting.all(".answer .text")]
    sitting.browser.refresh()
    sitting.sees("Rank these 4 answers")
    assert [card.text for card in sitting.all(".answer .text")] == shown
    assert sitting.text("#order").split("\n") == ["B", "A"]
    assert sitting.find("#note").get_property("value") == "why"
    sitting.pick("rank-2", 1).pick("rank-3", 1).save("Write the best answer")
    sitting.find("#text").send_keys("Line one\nline two")
    sitting.says("Draft saved", "#saved")
    sitting.run("localStorage.clear()")  # the server has it too
    sitting.browser.refresh()
    sitting.sees("Write the best answer")
    assert sitting.find("#text").get_property("value") == "Line one\nline two"


def test_two_tabs_get_different_tasks(page):
    sitting = page(PAIR, RANKING).begin().sees("Which answer is better?")
    first = sitting.browser.current_window_handle
    sitting.run("window.open(location.href)")  # copies the tab's storage, as duplicating it does
    sitting.until(lambda: len(sitting.browser.window_handles) == 2)
    sitting.browser.switch_to.window(next(h for h in sitting.browser.window_handles if h != first))
    sitting.sees("Rank these 4 answers").type("1234").save("Nothing left to label here")
    sitting.browser.switch_to.window(first)
    assert sitting.text("h1") == "Which answer is better?"
    sitting.type("1").save("Nothing left to label here")
    assert len({label.task for label in sitting.sitting.labels(current=False)}) == 2


def test_a_killed_server_loses_nothing(page):
    sitting = page(WRITING, PAIR).begin().sees("Write the best answer")
    sitting.errors = 100  # Chromium reports each failed request
    sitting.find("#text").send_keys("We meet")
    sitting.sitting.kill()
    sitting.find("#text").send_keys(" on Thursday")
    sitting.says("The server does not answer. What you entered is kept;", "#gone")
    sitting.find("#save").click()
    sitting.says("Sending", "#saved")
    assert sitting.find("#text").get_property("value") == "We meet on Thursday"
    sitting.sitting.start()
    sitting.run("document.getElementById('retry').click()")  # which may have gone already
    sitting.sees("Which answer is better?")
    assert not sitting.find("#gone").is_displayed()
    assert [x.value for x in sitting.sitting.labels()] == [{"text": "We meet on Thursday"}]
    sitting.pick("strength", 2).sitting.kill()
    sitting.sitting.start()
    sitting.browser.refresh()
    sitting.sees("Which answer is better?")
    assert sitting.find("input[name=strength][value='2']").is_selected()


def test_a_server_with_a_new_token_goes_on_when_its_link_was_opened(page):
    sitting = page(WRITING).begin().sees("Write the best answer")
    sitting.errors = 100
    first = sitting.browser.current_window_handle
    sitting.find("#text").send_keys("We meet on Thursday")
    sitting.sitting.kill()
    sitting.sitting.start(token="another")
    sitting.find("#save").click()
    sitting.says("The token is missing or old. Open the address that", "#gone")
    sitting.browser.switch_to.new_window("tab")
    sitting.open().sees("Nothing left to label here")
    sitting.browser.switch_to.window(first)
    sitting.run("document.getElementById('retry').click()")
    sitting.sees("Nothing left to label here")
    assert [x.value for x in sitting.sitting.labels()] == [{"text": "We meet on Thursday"}]


def test_what_only_the_owner_can_mend_is_said(page):
    sitting = page(PAIR).begin().sees("Which answer is better?").type("4")
    sitting.errors = 100
    guidelines = sitting.sitting.project.folder / "guidelines.md"
    guidelines.rename(guidelines.with_suffix(".old"))
    sitting.find("#save").click()
    sitting.says("guidelines.md", "#gone")
    guidelines.with_suffix(".old").rename(guidelines)
    sitting.run("document.getElementById('retry').click()")
    sitting.sees("Nothing left to label here")
    assert len(sitting.sitting.labels()) == 1


def test_a_task_that_another_tab_took_over(page, monkeypatch):
    monkeypatch.setattr(store, "OWN_IDLE", 0.0)
    sitting = page(WRITING).begin().sees("Write the best answer")
    sitting.errors = 100
    first = sitting.browser.current_window_handle
    sitting.find("#text").send_keys("We meet")
    sitting.says("Draft saved", "#saved")
    sitting.browser.switch_to.new_window("tab")
    sitting.open().sees("Write the best answer")
    assert sitting.find("#text").get_property("value") == "We meet"
    sitting.browser.switch_to.window(first)
    sitting.find("#text").send_keys(" today")
    sitting.find("#save").click()
    sitting.says("another tab")
    assert sitting.find("#text").get_property("value") == "We meet today"
    assert not sitting.sitting.labels()


def test_in_the_frame_of_a_notebook(page, tmp_path):
    """The notebook is another site, on `localhost`, so that cookies and storage are partitioned."""
    sitting = page(WRITING, PAIR, embedded=True)
    frame = f'<iframe src="{sitting.sitting.url}" style="width: 100%; height: 800px"></iframe>'
    (tmp_path / "notebook.html").write_text(f'<link rel="icon" href="data:,">{frame}')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as notebook:
        threading.Thread(target=notebook.serve_forever, daemon=True).start()
        address = f"http://localhost:{notebook.server_port}/notebook.html"
        sitting.origins.add(urlsplit(address)[:2])
        sitting.browser.get(address)
        sitting.browser.switch_to.frame(0)
        sitting.sees("Who labels?").type("heron\n").sees("Guidelines")
        sitting.find("#acknowledge").click()
        sitting.sees("Write the best answer").find("#text").send_keys("On Thursday")
        sitting.run("document.querySelector('h1').textContent = 'old'; location.reload()")
        sitting.sees("Write the best answer")
        assert sitting.find("#text").get_property("value") == "On Thursday"
        sitting.save("Which answer is better?")
        sitting.browser.switch_to.default_content()
        notebook.shutdown()
    assert len(sitting.sitting.labels()) == 1


# ------------------------------------------------------------------------------- hostile text

SCRIPT = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
HOSTILE = [
    SCRIPT,
    "\u202edrawkcab\u202c \u2067\u05d0\u05d1\u05d2 \u0633\u0644\u0627\u0645",
    "w" * 20_000,
    "many words " * 1_800,
    "a\x00\x07\ufeff\u200b\U0001f9d1\u200d\U0001f680 {{x}} ${y} `z` \\u0041",
]


def test_hostile_text_is_inert_and_the_layout_holds(page):
    prompt = [{"role": "system", "content": SCRIPT}, {"role": "user", "content": "w" * 500}]
    sitting = page(task("ranking", prompt, *HOSTILE), name="\u202e<b>x</b>" + "n" * 60)
    sitting.begin().sees("Rank these 5 answers")
    contents = "return [...document.querySelectorAll('.answer .text')].map((x) => x.textContent)"
    assert sorted(sitting.run(contents)) == sorted(HOSTILE)
    assert sitting.browser.title.startswith("Rank these 5 answers")
    assert not sitting.all("main script, main img, main b")
    sitting.run("document.querySelectorAll('.fold .link').forEach((more) => more.click())")
    for width in (360, 1200):
        headless.emulate(sitting.browser, width=width)
        assert sitting.run("return document.documentElement.scrollWidth") <= width
        outside = """return [...document.querySelectorAll('header *, main *')].filter((x) =>
            x.getBoundingClientRect().right > innerWidth + 1).map((x) => x.outerHTML)"""
        assert sitting.run(outside) == []


def test_markup_and_foreign_requests_are_refused_by_the_policy(page):
    sitting = page(PAIR).begin().sees("Which answer is better?")
    script = """try { document.body.insertAdjacentHTML('beforeend', '<b>x</b>'); return 'parsed'; }
        catch (error) { return error.name; }"""
    assert sitting.run(script) == "TypeError"  # trusted types
    script = "return fetch('https://example.org/').then(() => 'sent', (error) => error.name)"
    assert sitting.run(script) == "TypeError"
    script = "return fetch('/').then((r) => r.headers.get('content-security-policy'))"
    policy = sitting.run(script)
    assert "default-src 'none'" in policy and "unsafe" not in policy
    sitting.errors = 9  # the policy's, here alone


# ------------------------------------------------------------------------------ accessibility


def test_contrast_in_light_and_dark(page):
    sitting = page(RANKING).begin().sees("Rank these 4 answers").type("1")
    texts = [
        ("h1", "body"),
        (".lead", "body"),
        (".prompt h2", ".prompt"),
        (".answer .text", ".answer"),
        (".answer legend", ".answer"),
        ("input:checked + span", "input:checked + span"),
        ("header button", "header"),
        ("#count", "header"),
        ("#save", "footer"),
        ("#message", "footer"),
        ("#gone-text", "#gone"),
        ("#order li", "#order li"),
    ]
    for scheme in ("light", "dark"):
        headless.emulate(sitting.browser, scheme)
        time.sleep(0.2)  # colors fade
        page_is_light = headless.luminance(sitting.browser, "body", "background-color") > 0.5
        assert page_is_light == (scheme == "light")
        for text, ground in texts:
            contrast = headless.contrast(sitting.browser, text, ground)
            assert contrast >= 4.5, (scheme, text)  # WCAG AA


def test_names_roles_and_order_of_focus(page):
    from selenium.webdriver.common.keys import Keys

    sitting = page(RANKING).begin().sees("Rank these 4 answers")
    assert sitting.run("return document.documentElement.lang") == "en"
    assert sitting.focused().tag_name == "h1"  # a screen reader begins with the task
    controls = sitting.all("main input, main textarea, main button, header button, footer button")
    names = [control.accessible_name for control in controls]
    assert all(names) and len(names) == 16 + 4 + 1 + 3 + 3
    group = sitting.find(".answer fieldset")
    assert group.aria_role == "group" and group.accessible_name == "Rank of answer A"
    assert sitting.find("[name=rank-0][value='1']").accessible_name == "1, best"
    stops = []
    for _ in range(8):
        sitting.type(Keys.TAB)
        focus = sitting.focused()
        stops.append(focus.get_attribute("name") or focus.get_attribute("id"))
        assert sitting.run(
            "const x = document.activeElement; return [x, x.nextElementSibling].some((y) => "
            "y && getComputedStyle(y).outlineStyle === 'solid')"
        ), stops
    ranks = [f"rank-{place}" for place in range(4)]
    assert stops == [*ranks, "both-bad", "flag", "flag", "flag"]
    sitting.find("[name=rank-1][value='2']").send_keys(Keys.SPACE)
    assert sitting.find("#say").aria_role == "status"
    assert sitting.find("#say").get_property("textContent") == "Answer B: rank 2. Order: B."
    sitting.find("#save").click()
    sitting.says("No rank yet: answers A, C and D.")
    assert sitting.find("#message").aria_role == "alert"
    assert sitting.focused().accessible_name == "Answer A"


def test_a_phone(page):
    sitting = page(RANKING, PAIR, RATING, WRITING)
    headless.emulate(sitting.browser, width=360)
    sitting.begin()
    for heading in (
        "Rank these 4 answers",
        "Which answer is better?",
        "Rate this answer",
        "Write the best answer",
    ):
        sitting.sees(heading)
        assert sitting.run("return document.documentElement.scrollWidth") <= 360
        boxes = [box.rect for box in sitting.all("main .pick, main .check, footer button")]
        assert all(box["width"] >= 24 and box["height"] >= 40 for box in boxes)
        names = {"Rank": "rank-", "Whic": "strength", "Rate": "overall"}
        for choice in sitting.all(f"input[name^='{names.get(heading[:4])}'][value='2']"):
            tap(sitting, choice)
            assert choice.is_selected()
        for rest in sitting.all("#rest, #text"):
            tap(sitting, rest)
        if heading.startswith("Write"):
            sitting.type("On Thursday.")
        tap(sitting, sitting.find("#save"))
    sitting.sees("Nothing left to label here")
    assert len(sitting.sitting.labels()) == 4


def test_nine_answers_on_a_small_phone(page):
    """Each rank can be touched, also again to correct it, and none lies outside its card."""
    sitting = page(task("ranking", "Which?", *(f"Number {n}." for n in range(9))))
    headless.emulate(sitting.browser, width=320)
    sitting.begin().sees("Rank these 9 answers")
    assert sitting.run("return document.documentElement.scrollWidth") <= 320
    boxes = [box.rect for box in sitting.all("main .pick")]
    assert len(boxes) == 81 and all(box["width"] >= 24 and box["height"] >= 40 for box in boxes)
    right = "return arguments[0].getBoundingClientRect().right"
    assert all(
        sitting.run(right, pick) <= sitting.run(right, card)
        for card in sitting.all(".answer")
        for pick in card.find_elements("css selector", ".pick:last-child")
    )
    tap(sitting, sitting.find("[name='rank-0'][value='1']"))
    for place in range(9):
        choice = sitting.find(f"[name='rank-{place}'][value='{9 - place}']")
        tap(sitting, choice)
        assert choice.is_selected()
    tap(sitting, sitting.find("#save"))
    sitting.sees("Nothing left to label here")
    [label] = sitting.sitting.labels()
    assert [label.value["ranks"][index] for index in label.order] == [*range(9, 0, -1)]


def tap(page, element):
    """Touch the middle of an element, after bringing it into view."""
    script = "arguments[0].scrollIntoView({block: 'center'}); "
    script += "const r = arguments[0].getBoundingClientRect(); "
    script += "return [r.x + r.width / 2, r.y + r.height / 2]"
    x, y = page.run(script, element)
    for kind, points in (("touchStart", [{"x": x, "y": y}]), ("touchEnd", [])):
        page.browser.execute_cdp_cmd(
            "Input.dispatchTouchEvent", {"type": kind, "touchPoints": points}
        )
