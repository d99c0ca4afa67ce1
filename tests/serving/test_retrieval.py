"""Documents of each kind, cut in passages that keep their place, and found again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_rlhf.errors import DataError
from lora_rlhf.serving import retrieval
from lora_rlhf.serving.retrieval import Index, read

BOILER = """# Boiler
The boiler heats water to 60 degrees.

## Service
Call the workshop in Porto.

```
# no heading
```

# Pump
The pump moves 12 litres a minute.
"""
PAGE = """<html><head><title>no</title></head><body><h1>Pump</h1><p>It moves 12 litres.
<p hidden>hidden one<p>It is quiet &amp; small.<div style="color:red; display: none">hidden
<b>two</b></div>
<ul><li>left<li>right</ul><script>hidden = 3</script><!-- hidden four --></body></html>"""


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def pdf(*pages: str) -> bytes:
    """A small PDF with one line of text on each page."""
    kids = [f"{4 + 2 * n} 0 R" for n in range(len(pages))]
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{' '.join(kids)}]/Count {len(pages)}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for n, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET"
        objects += [
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 400 200]/Contents {5 + 2 * n} 0 R"
            "/Resources<</Font<</F1 3 0 R>>>>>>",
            f"<</Length {len(stream)}>>stream\n{stream}\nendstream",
        ]
    made, places = "%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(made))
        made += f"{number} 0 obj{content}endobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    made += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    start = made.index("xref")
    return (
        made + f"trailer<</Root 1 0 R/Size {len(objects) + 1}>>\nstartxref\n{start}\n%%EOF"
    ).encode()


def test_a_passage_of_markdown_has_its_headings_and_its_place_in_the_text(tmp_path: Path) -> None:
    written(tmp_path, "notes/boiler.md", BOILER)
    made = read(tmp_path)
    assert [p.place for p in made] == ["Boiler", "Boiler > Service", "Pump"]
    assert {p.file for p in made} == {"notes/boiler.md"}
    assert all(BOILER[p.start : p.end] == p.text for p in made)
    assert "# no heading" in made[1].text
    assert made[2].where == f"notes/boiler.md, Pump, {made[2].start}-{made[2].end}"


def test_what_a_browser_does_not_show_is_not_read(tmp_path: Path) -> None:
    [one] = read(written(tmp_path, "page.html", PAGE))
    assert one.text.split() == "It moves 12 litres. It is quiet & small. left right".split()
    assert one.place == "Pump"


def test_a_pdf_is_read_by_pages_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "manual.pdf"
    path.write_bytes(pdf("The tank holds 40 litres.", "The lamp is green."))
    assert [(p.place, p.text) for p in read(path)] == [
        ("page 1", "The tank holds 40 litres."),
        ("page 2", "The lamp is green."),
    ]
    path.write_bytes(b"%PDF-1.4 not one")
    with pytest.raises(DataError, match="manual.pdf"):
        read(path)


def test_texts_are_bounded_in_all_and_pdfs_in_pages(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "manual.pdf"
    path.write_bytes(pdf("The tank holds 40 litres.", "The lamp is green.", "It hums."))
    written(tmp_path, "notes.txt", "x" * 30)
    monkeypatch.setattr(retrieval, "MOST_CHARACTERS", 80)
    with pytest.raises(DataError, match=r"notes.txt(.|\n)*80 characters of text in all sources"):
        read(tmp_path)
    monkeypatch.setattr(retrieval, "MOST_CHARACTERS", 20)  # not one page more is read
    with pytest.raises(DataError, match=r"manual.pdf(.|\n)*20 characters"):
        retrieval._sections(path)
    monkeypatch.setattr(retrieval, "MOST_PAGES", 2)
    monkeypatch.setattr(retrieval, "MOST_CHARACTERS", 1_000)
    with pytest.raises(DataError, match=r"manual.pdf(.|\n)*2 pages of a PDF"):
        read(path)


def test_long_texts_are_cut_at_sentences_and_never_beyond_the_limit() -> None:
    text = "A sentence with words. " * 100 + "x" * 2_000
    pieces = [text[a:b] for a, b in retrieval._pieces(text)]
    assert max(map(len, pieces)) <= retrieval.PASSAGE
    assert all(piece.endswith(".") for piece in pieces[:3])
    assert "".join("".join(pieces).split()) == "".join(text.split())  # nothing is lost


def test_a_folder_gives_no_hidden_file_and_nothing_outside_it(tmp_path: Path) -> None:
    outside = written(tmp_path, "secret.txt", "secret")
    written(tmp_path, "in/.hidden.txt", "hidden")
    written(tmp_path, "in/a.txt", "plain")
    written(tmp_path, "in/b.csv", "no,text")
    (tmp_path / "in/link.txt").symlink_to(outside)
    assert [p.text for p in read(tmp_path / "in")] == ["plain"]
    with pytest.raises(DataError, match="no text"):
        read(written(tmp_path, "empty/a.txt", " \n"))
    with pytest.raises(DataError, match="no such file or folder"):
        read(tmp_path / "absent")


def test_the_search_finds_words_in_text_and_headings_and_nothing_without_one(
    tmp_path: Path,
) -> None:
    index = Index(read(written(tmp_path, "boiler.md", BOILER)))
    assert index.search("How many litres does it move?")[0].place == "Pump"
    assert index.search("Who services it?", 1)[0].place == "Boiler > Service"
    assert index.search("zebra") == index.search("the of it") == index.search("") == []


def test_embeddings_add_what_shares_no_word(tmp_path: Path) -> None:
    def embed(texts: list[str]) -> np.ndarray:
        return np.array([[float("Porto" in t or "fado" in t), 0.1] for t in texts])

    passages = read(written(tmp_path, "boiler.md", BOILER))
    assert Index(passages).search("fado") == []
    assert Index(passages, embed).search("fado", 1)[0].place == "Boiler > Service"
    both = Index(passages, embed).search("fado about the pump", 2)
    assert [p.place for p in both] == ["Pump", "Boiler > Service"] or len(both) == 2
