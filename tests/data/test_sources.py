# SPDX-License-Identifier: Apache-2.0
"""Files of every format, the Hub, and errors with their place."""

import csv
import gzip
import json
import os

import pytest
from data_sources import (
    PAIRS,
    Words,
    all_rows,
    jsonl,
    recipe,
)

from lora_rlhf.data import dataset_builder, sources
from lora_rlhf.errors import DataError
from lora_rlhf.recipe.schema import DataSource


@pytest.mark.parametrize(
    "ending", ["jsonl", "ndjson", "jsonl.gz", "json", "csv", "tsv", "csv.gz", "parquet"]
)
def test_every_format_gives_the_same_rows(tmp_path, plain, ending):
    path = tmp_path / f"d.{ending}"
    rows = [{"prompt": f'q{i}, "x"\nline', "completion": f"a{i} \u2028 é"} for i in range(40)]
    if "json" in ending:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = f"[{','.join(lines)}]" if ending == "json" else "\n".join(lines)
        raw = text.encode()
        path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    elif ending == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        opened = gzip.open if ending.endswith("gz") else open
        with opened(path, "wt", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if "tsv" in ending else ",")
            writer.writeheader()
            writer.writerows(rows)
    prepared = dataset_builder.demonstrations(recipe(demonstrations=path), plain)
    assert sorted(r["completion"] for r in all_rows(prepared)) == sorted(
        r["completion"] for r in rows
    )
    assert sorted(r["prompt"] for r in all_rows(prepared)) == sorted(r["prompt"] for r in rows)


def test_byte_order_mark_and_crlf_are_accepted(tmp_path, plain):
    path = tmp_path / "d.jsonl"
    lines = "\r\n".join(json.dumps(row) for row in PAIRS)
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n\r\n")
    prepared = dataset_builder.demonstrations(recipe(demonstrations=path), plain)
    assert len(all_rows(prepared)) == 60
    assert set(prepared.train.column_names) == {"prompt", "completion"}


GOOD = json.dumps(PAIRS[0]).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "raw", "where", "message"),
    [
        ("a.jsonl", GOOD + b'{"prompt": "x", \n' + GOOD, "a.jsonl:2", 'not valid JSON at column'),
        ("b.jsonl", GOOD + b"[1, 2]\n", "b.jsonl:2", "a JSON list: [1, 2]"),
        ("c.jsonl", b" \n", "c.jsonl", "the file is empty"),
        ("d.jsonl", GOOD + GOOD + b'{"prompt": "caf\xe9"}\n', "d.jsonl:3", r"0xe9 at column 16"),
        ("e.jsonl", GOOD + b'{"prompt": "\\ud800y", "completion": ""}\n', "e.jsonl:2", r"\ud800y"),
        ("f.jsonl.gz", b"no gzip", "f.jsonl.gz", "cannot be read"),
        ("g.csv", b'prompt,completion\n"two\nlines",b\nx,"y', "g.csv:4", "not valid CSV"),
        ("h.csv", b'prompt,completion\n"two\nlines",b\nx,y,z\n', "h.csv:4", "3 cells under 2"),
        ("i.parquet", b"PAR1 not", "i.parquet", "not valid parquet"),
        ("j.json", b'[{"prompt": "x"},\n 7,]', "j.json:2", "not valid JSON"),
        ("k.txt", b"x", "k.txt", "files ending in '.txt'"),
        ("l.jsonl", b"[" * 100_000, "l.jsonl:1", "not valid JSON"),
        ("m.json", b'[{"prompt": "x"}, 7]', "m.json row 2", "a JSON int: 7"),
        ("n.csv", b"prompt,answer,prompt\na,b,c\n", "n.csv:1", "two columns are called"),
        ("o.jsonl", gzip.compress(GOOD, mtime=0), "o.jsonl", "its content is that of a .gz file"),
        ("p.csv", b"PK\x03\x04\0\0", "p.csv", "its content is that of a .zip or .xlsx file"),
        ("q.json", b'{"data": [%s]}' % b",".join([GOOD] * 2), "q.json:1", "its rows inside 'data'"),
        ("r.json", b'{"prompt": {"0": "x", "1": "y"}, "completion": {"0": "a", "1": "b"}}',
         "r.json:1", "the file holds columns (prompt, completion), not rows"),
        ("s.jsonl", GOOD + b'{"prompt": "x", "completion": "y", "prompt": "z"}', "s.jsonl:2",
         "the key 'prompt' is given twice"),
        ("t.csv", b"sep=;\nprompt;completion\na;b\na;b;c\n", "t.csv:4", "3 cells under 2"),
    ],
)  # fmt: skip
def test_an_unreadable_file_is_one_error_with_its_place(tmp_path, plain, name, raw, where, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        dataset_builder.demonstrations(recipe(demonstrations=tmp_path / name), plain)
    assert caught.value.where.endswith(where)
    assert message in caught.value.given
    str(caught.value).encode()  # nothing that a terminal cannot show


def test_a_list_in_a_jsonl_and_a_header_with_spaces_are_read(tmp_path, plain):
    (tmp_path / "a.jsonl").write_text(json.dumps(PAIRS, indent=1), encoding="utf-8")
    lines = [f"{row['prompt']}; {row['completion']}" for row in PAIRS]
    (tmp_path / "b.csv").write_text("\n".join(["sep=;", "prompt; completion", *lines]), "utf-8")
    for name in ("a.jsonl", "b.csv"):
        prepared = dataset_builder.demonstrations(recipe(demonstrations=tmp_path / name), plain)
        assert len(all_rows(prepared)) == 60


def test_one_row_with_a_list_of_objects_is_a_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "checks": [{"a": 1}, {"b": 2}]}\n', "utf-8")
    source = DataSource(path=str(tmp_path / "a.jsonl"))
    assert len(sources.read(source, sources.Skips())) == 1


@pytest.mark.parametrize(
    ("path", "remedy"), [("set", "in it are a.jsonl"), ("set/*.jsonl", "patterns are not read")]
)
def test_a_folder_and_a_pattern_say_how_files_are_named(tmp_path, plain, path, remedy):
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "a.jsonl", PAIRS)
    with pytest.raises(DataError) as caught:
        dataset_builder.demonstrations(recipe(demonstrations=tmp_path / path), plain)
    assert remedy in caught.value.remedy
    (tmp_path / "set" / "dataset_info.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        dataset_builder.demonstrations(recipe(demonstrations=tmp_path / "set"), plain)
    assert "load_from_disk" in caught.value.remedy


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_a_pipe_and_a_broken_link_do_not_suggest_themselves(tmp_path, plain):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name, given in (("pipe", "a pipe or a device"), ("loop", "no such file")):
        with pytest.raises(DataError, match=given) as caught:
            dataset_builder.demonstrations(recipe(demonstrations=tmp_path / f"{name}.jsonl"), plain)
        assert caught.value.remedy == "check the path"


def test_excerpts_are_short_and_escaped(tmp_path, plain):
    (tmp_path / "a.jsonl").write_text('{"\x1b[31m\u202e' + "x" * 10_000, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        dataset_builder.demonstrations(recipe(demonstrations=tmp_path / "a.jsonl"), plain)
    assert r"\x1b[31m\u202e" in caught.value.given
    assert len(caught.value.given) < 200


def test_a_csv_cell_of_a_megabyte_is_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n" + f"{'x ' * 500_000},y\n" + "q,a\n" * 2, encoding="utf-8")
    csv.field_size_limit(131_072)
    with pytest.raises(DataError, match="over data.max_tokens = 1024: 2 -> 1"):
        dataset_builder.demonstrations(recipe(demonstrations=path), Words())
    assert csv.field_size_limit() == 131_072  # the csv module's setting is everybody's


def test_spaces_before_quotes_and_empty_rows_of_a_csv_are_no_texts(tmp_path, plain):
    path = tmp_path / "a.csv"
    rows = "".join(f'"q{i}, please", "a{i}, then wait"\n' for i in range(40))
    path.write_text(f"prompt, completion\n{rows}" + ",\n" * 60, encoding="utf-8")
    prepared = dataset_builder.demonstrations(recipe(demonstrations=path), plain)
    expected = {(f"q{i}, please", f"a{i}, then wait") for i in range(40)}
    assert {(row["prompt"], row["completion"]) for row in all_rows(prepared)} == expected
    assert prepared.report["rows"] == 40


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("text", "remedy"), [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ("<!DOCTYPE html>\n<html><body>Not, found</body></html>\n", "download the file itself"),
])  # fmt: skip
def test_what_came_in_the_place_of_the_file_is_named(tmp_path, plain, ending, text, remedy):
    (tmp_path / f"d.{ending}").write_text(text)
    with pytest.raises(DataError, match="this is a p") as caught:
        dataset_builder.demonstrations(recipe(demonstrations=tmp_path / f"d.{ending}"), plain)
    assert remedy in caught.value.remedy


def test_a_missing_file_suggests_its_neighbour(tmp_path, plain):
    jsonl(tmp_path / "train.jsonl", PAIRS)
    with pytest.raises(DataError, match=r"did you mean train\.jsonl\?"):
        dataset_builder.demonstrations(recipe(demonstrations=tmp_path / "trian.jsonl"), plain)


def test_data_paths_stay_inside_the_data_folder(tmp_path, plain, monkeypatch):
    inside = tmp_path / "in"
    inside.mkdir()
    jsonl(inside / "d.jsonl", PAIRS)
    jsonl(tmp_path / "secret.jsonl", PAIRS)
    monkeypatch.delenv("LORA_RLHF_DATA", raising=False)
    with pytest.raises(DataError, match="LORA_RLHF_DATA is not set"):
        dataset_builder.demonstrations(recipe(demonstrations="data://d.jsonl"), plain)
    monkeypatch.setenv("LORA_RLHF_DATA", str(inside))
    assert (
        dataset_builder.demonstrations(recipe(demonstrations="data://d.jsonl"), plain).report[
            "train"
        ]
        > 40
    )
    for path in ("../secret.jsonl", "x/../../secret.jsonl", str(tmp_path / "secret.jsonl")):
        with pytest.raises(DataError, match="leaves the folder"):
            dataset_builder.demonstrations(recipe(demonstrations=f"data://{path}"), plain)


def test_a_hub_dataset_that_cannot_be_reached_says_what_to_do(plain):
    import datasets

    assert datasets.config.HF_HUB_OFFLINE
    with pytest.raises(DataError, match="give its `path:` instead of `hub:`"):
        dataset_builder.demonstrations(recipe(demonstrations={"hub": "nobody/nothing-here"}), plain)
    with pytest.raises(DataError, match="org/name"):
        dataset_builder.demonstrations(recipe(demonstrations={"hub": "/etc/passwd"}), plain)


def test_a_hub_dataset_is_read_by_configuration_split_and_revision(plain, monkeypatch):
    import datasets

    def load(path, name, data_dir, split, revision):
        assert (path, name, data_dir, split, revision) == ("org/d", "en", "sub", "test", "abc")
        return datasets.Dataset.from_list(PAIRS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = {"hub": "org/d", "name": "en", "split": "test", "license": "mit", "revision": "abc"}
    source["data_dir"] = "sub"
    prepared = dataset_builder.demonstrations(recipe(demonstrations=source), plain)
    [reported] = prepared.report["sources"]
    assert reported.pop("sha256")
    assert reported == {
        "kind": "hub",
        "name": "org/d",
        "license": "mit",
        "rows": 60,
        "config": "en",
        "split": "test",
        "revision": "abc",
        "data_dir": "sub",
    }


def test_broken_lines_do_not_read_the_whole_file_each(tmp_path, plain, monkeypatch):
    looked, remedy = [], sources._to_utf8
    monkeypatch.setattr(sources, "_to_utf8", lambda *args: looked.append(1) or remedy(*args))
    lines = [json.dumps(row).encode() for row in PAIRS] + [b'{"prompt": "\xe9"}'] * 9
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    given = {"path": str(tmp_path / "d.jsonl"), "skip_bad": 9}
    prepared = dataset_builder.demonstrations(recipe(demonstrations=given), plain)
    assert len(all_rows(prepared)) == len(PAIRS) and len(looked) == 1
