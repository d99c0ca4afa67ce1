# SPDX-License-Identifier: Apache-2.0
"""Checks of answers, one right and one wrong text for each, and the packaged templates."""

import jinja2
import pytest

from lora_rlhf.errors import DataError, UsageError
from lora_rlhf.serving import instruction_templates, output_checks
from lora_rlhf.serving.output_checks import Length

SOURCE = "Ada keeps a red lamp in Oslo – “mostly for Bob's cat”. It cost 12 crowns."
GERMAN = "Das Haus am See wurde im Sommer verkauft, weil niemand mehr darin wohnen wollte."
ENGLISH = "The house by the lake was sold in summer because nobody wanted to live there."


def failed(answer, source=SOURCE, **asked):
    return [c.name for c in output_checks.run(answer, asked, source) if c.passed is False]


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("5 words", "one two three four five", "one two three four five six"),
        ("3", "one two three", "one two three four"),
        ("2-3 words", "one two", "one"),
        ("2 sentences", "One is 1.5 m. Two!", "One. Two? Three."),
        ("1 sentence", "no full stop", "One. two"),
        ("2 bullets", "- a\n- b", "- a"),
    ],
)
def test_length(text, right, wrong):
    length = Length.parse(text)
    assert failed(right, length=length) == []
    assert failed(wrong, length=length) == ["length"]


@pytest.mark.parametrize("text", ["", "0 words", "9-3 words", "five", "3 pages", "-2"])
def test_a_length_that_is_none(text):
    with pytest.raises(UsageError, match="--length"):
        Length.parse(text)


@pytest.mark.parametrize(
    ("asked", "right", "wrong"),
    [
        ({"format": "bullets"}, "- a\n- b", "a\n- b"),
        ({"format": "json"}, '{"a": 1}', "{'a': 1}"),
        ({"format": "line"}, "one", "one\ntwo"),
        ({"format": "text"}, "One - two.", "- one\n- two"),
        ({"labels": ["good", "bad"]}, " good\n", "Good"),
        ({"schema": {"type": "object", "required": ["a"]}}, '{"a": 1}', '{"b": 1}'),
        ({"shorter": True}, "Ada keeps a lamp.", SOURCE),
        ({"quotes": True}, 'She has it "Mostly for Bob’s cat."', 'She has it "for her cat"'),
        ({"quotes": True}, 'It is "a red lamp ... for Bob\'s cat"', 'A "for Bob ... red lamp"'),
        ({"quotes": True}, '{"colour": "a “red  lamp”"}', '{"colour": "a “blue lamp”"}'),
        ({"numbers": True}, "It was 12.", "It was 13."),
        ({"in_source": True}, '{"price": 12, "for": ["Bob"]}', '{"price": 1}'),
        ({"in_source": True}, "- colour: red\n- city: Oslo", "- colour: re"),
    ],
)
def test_each_check(asked, right, wrong):
    assert failed(right, **asked) == []
    assert failed(wrong, **asked) == list(asked)


def test_an_ellipsis_is_bounded():
    apart = f"The pump is safe. {'More of the manual. ' * 12}Near water, call the fire brigade."
    assert output_checks.stands_in("The pump is ... of the manual", apart)
    for quote in ("The pump is safe ... call the fire brigade", "pump … manual … fire brigade"):
        assert failed(f'It says "{quote}".', apart, quotes=True) == ["quotes"]
        assert failed(f"- {quote}", apart, in_source=True) == ["in_source"]
    late = f"{apart} {apart} The pump is safe if you call the fire brigade."
    assert output_checks.stands_in("The pump is safe ... call the fire brigade", late)
    for none in ("...", "", "The pump ... fire brig"):
        assert not output_checks.stands_in(none, late)


def test_language():
    pytest.importorskip("py3langid")
    assert failed(GERMAN, to="German") == failed(GERMAN, to="de") == []
    assert failed(GERMAN, to="French") == ["to"]
    assert failed(ENGLISH, GERMAN, same_language=True) == ["same_language"]
    [_, check] = output_checks.run("ok", {"to": "French"})
    assert check.passed is None  # too short to tell
    with pytest.raises(UsageError, match="Klingon"):
        output_checks.language_code("Klingon")
    assert not set(output_checks.LANGUAGES.values()) - set(output_checks._detector().labels)


def test_numbers_may_be_words_in_the_text():
    source = "It takes six weeks and costs 400,000 euros, 2.5 each."
    assert failed("6 weeks, 400000 euros, 2.5. A4 paper", source, numbers=True) == []
    [_, check] = output_checks.run("4 weeks, 1.5 each", {"numbers": True}, source)
    assert check.problem == "not in the text: 4, 1.5"


def test_an_empty_answer_fails_once():
    assert failed(" \n", format="json", quotes=True) == ["not empty"]


# --- templates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", instruction_templates.names())
def test_packaged_templates(verb):
    template = instruction_templates.load(verb)
    options = {
        "tone": "kind", "format": "bullets", "length": "at most 9 words", "to": "German",
        "labels": ["a", "b"], "question": "Who?", "schema": None,
    }  # fmt: skip
    known = {k: v for k, v in options.items() if k in (*template.takes, *template.needs)}
    template.check_options(known)
    filled = template.fill("{{ text }} <b>", **known)
    assert "{{ text }} <b>" in filled  # the text is never read as a template
    assert all(str(v) in filled for k, v in known.items() if k in ("tone", "length", "to"))
    assert len(template.sha256) == 64 and template.about


def test_options_that_a_template_does_not_use():
    classify = instruction_templates.load("classify")
    with pytest.raises(UsageError, match="classify needs --labels"):
        classify.check_options({})
    with pytest.raises(UsageError, match="does not use --tone"):
        classify.check_options({"labels": ["a", "b"], "tone": "kind"})
    with pytest.raises(UsageError, match="did you mean summarize"):
        instruction_templates.load("sumarize")


def own(tmp_path, text, head="about: mine"):
    path = tmp_path / "mine.md"
    path.write_text(f"---\n{head}\n---\n{text}", encoding="utf-8")
    return instruction_templates.load("x", path)


def test_a_template_of_ones_own(tmp_path):
    template = own(tmp_path, "{% if tone == 'kind' %}Please. {% endif %}{{ text | trim }}\n",
                   "takes: [tone]\nchecks: [quotes]")  # fmt: skip
    assert template.fill(" a ", tone="kind") == "Please. a"
    assert (template.name, template.checks) == ("mine", ["quotes"])
    again = own(tmp_path, "{{ text }}")
    assert again.sha256 != template.sha256


@pytest.mark.parametrize(
    "text",
    [
        "{{ text }}{% for a in range(9) %}x{% endfor %}",
        "{{ text }}{% set a = text ~ text %}",
        "{{ text }}{{ text * 1000000 }}",
        "{{ text }}{{ ().__class__.__mro__ }}",
        "{{ text }}{{ text.format(1) }}",
        "{{ text }}{% include '/etc/passwd' %}",
        "{{ text }}{{ other }}",
        "{{ text | replace('a', text) }}",
        "{{ text",
        "no text",
        "{% if " + "not " * 9000 + "text %}{% endif %}",
    ],
)
def test_a_template_cannot_run_programs(tmp_path, text):
    with pytest.raises(DataError, match=r"mine\.md"):
        own(tmp_path, text)


def test_constants_of_a_refused_template_are_not_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(jinja2.Environment, "from_string", lambda *_: pytest.fail("compiled"))
    with pytest.raises(DataError, match="uses mul"):
        own(tmp_path, "{{ text }}{{ 'a' * 10 ** 9 }}")


@pytest.mark.parametrize(
    "head", ["checks: [all]", "takes: 3", "sha: x", "split: perhaps", "- a", "a: [", "a: &x [*x]"]
)
def test_a_broken_front_matter(tmp_path, head):
    with pytest.raises((DataError, UsageError)) as caught:
        own(tmp_path, "{{ text }}", head)
    assert "mine.md" in str(caught.value)


def test_a_filter_that_fails_is_one_error(tmp_path):
    with pytest.raises(DataError, match="the template fails"):
        own(tmp_path, "{{ labels | join }}{{ text }}", "takes: [labels]").fill("a")
