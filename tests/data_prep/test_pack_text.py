from __future__ import annotations

import json

import pack_text
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhmoe_vl.errors import DataError


def test_parts_end_with_a_sentence_where_one_ends_late_enough():
    text = "One two. Three four five. Six seven eight nine ten."
    assert list(pack_text.parts(text, 6)) == ["One two. Three four five.", "Six seven eight nine ten."]
    assert list(pack_text.parts("One. two three four five six seven eight", 4)) == [
        "One. two three four",
        "five six seven eight",
    ]
    assert list(pack_text.parts(text, 100)) == [text]


def test_characters_count_as_words_where_there_are_no_blanks():
    assert list(pack_text.parts("今天天气好。我们去公园散步。", 8)) == ["今天天气好。", "我们去公园散步。"]


@given(st.text(alphabet="ab .!?\t今天。，\u00a0\"'", max_size=80), st.integers(1, 9))
def test_nothing_is_lost_in_parts(text, max_words):
    parts = list(pack_text.parts(text.strip(), max_words))
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(len(pack_text.WORD.findall(part)) <= max_words for part in parts)


def test_plain_text_keeps_all_but_headings_and_blank_lines(tmp_path):
    lines = [" ", " = Robert <unk> = ", " = = Career = = ", " He had a guest @-@ starring role . ", "a = b", ""]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    assert pack_text.read_paragraphs(tmp_path / "a.txt") == ["He had a guest @-@ starring role .", "a = b"]


def test_parts_of_a_paragraph_stay_in_one_split_and_short_ones_go(tmp_path, load):
    paragraphs = [" ".join([f"paragraph{i:02}"] * 12) for i in range(20)]
    (tmp_path / "a.txt").write_text("\n".join(paragraphs))
    arguments = ["--texts", f"{tmp_path}/a.txt", "--out", f"{tmp_path}/out", "--val-fraction", "0.2"]
    pack_text.main([*arguments, "--max-words", "5", "--min-chars", "30"])  # 12 words: 5, 5 and 2, the last too short
    train, val = ([s["txt"].decode() for s in load(tmp_path / "out" / n).values()] for n in ("train", "val"))
    assert (len(train), len(val)) == (32, 8)
    assert not {t.split()[0] for t in train} & {t.split()[0] for t in val}


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("a.json", "[]", ": no list 'data' (name a file in SQuAD's format)"),
        ("a.json", '{"data": [3]}', ":data[0]: no list 'paragraphs' (name a file in SQuAD's format)"),
        ("a.json", '{"data": [{"paragraphs": [{}]}]}', ":data[0].paragraphs[0].context: no text (name a file in SQuAD"),
        ("a.json", "{\n{", ":2: not JSON: "),
        ("a.txt", "x", None),
    ],
)
def test_bad_files(name, data, line, tmp_path):
    (tmp_path / name).write_text(data)
    with pytest.raises(DataError) as error:
        pack_text.main(["--texts", f"{tmp_path}/{name}", "--out", f"{tmp_path}/out"])
    place = f"{tmp_path}/{name}{line}" if line else f"{tmp_path}/out: nothing to pack"
    assert str(error.value).startswith(place)


def test_real_texts(data_dir, tmp_path, load):
    source = data_dir / "text"
    files = [source / "wikitext-2/valid.txt", *sorted((source / "xquad").glob("*.json"))]
    pack_text.main(["--texts", *map(str, files), "--out", str(tmp_path), "--val-fraction", "0.1"])
    train, val = ([s["txt"].decode() for s in load(tmp_path / n).values()] for n in ("train", "val"))
    assert all(len(t) >= 20 and len(pack_text.WORD.findall(t)) <= 40 for t in train + val)
    whole = "".join("".join(train + val).split())
    contexts = [p["context"] for f in files[1:] for a in json.loads(f.read_text())["data"] for p in a["paragraphs"]]
    assert len(contexts) == 7 * 240
    kept = sum("".join(c.split())[:40] in whole for c in contexts)
    assert kept == len(contexts)
    assert "Homarusgammarus,knownastheEuropeanlobsterorcommonlobster" in whole
    assert not any(t.startswith("= ") for t in train + val)
