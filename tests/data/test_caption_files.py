"""Caption files in their three forms: the real ones read, and every way in which one can be wrong is one line."""

from __future__ import annotations

import copy
import gzip
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutate, mutate_text

from mhmoe_vl.data.annotated import PictureFolders, missing_pictures
from mhmoe_vl.data.captions import read_captions, read_references
from mhmoe_vl.errors import DataError

COCO = {
    "images": [{"id": 7, "file_name": "val2014/COCO_val2014_000000000007.jpg"}, {"id": 3}, {"id": 5}],
    "annotations": [
        {"id": 30, "image_id": 3, "caption": "A cat."},
        {"id": 10, "image_id": 7, "caption": "Ein Hund läuft. 犬が走る"},
        {"id": 20, "image_id": 7, "caption": "A dog runs.\n"},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {"cocoid": 7, "imgid": 0, "filepath": "val2014", "filename": "COCO_val2014_000000000007.jpg", "split": "test"},
        {"cocoid": 3, "imgid": 1, "filepath": "train2014", "filename": "COCO_train2014_000000000003.jpg"},
        {"cocoid": 5, "imgid": 2, "filepath": "val2014", "filename": "COCO_val2014_000000000005.jpg", "split": "val"},
    ],
}
KARPATHY["images"][1]["split"] = "restval"
for number, entry in enumerate(KARPATHY["images"]):
    entry["sentences"] = [{"raw": f"Caption {n}.", "tokens": ["caption"]} for n in range(number)]
FLICKR = 'image,caption\nb.jpg,"A dog , running ."\na.jpg,He says "hi"\n\nb.jpg,"A ""big"" dog"\n'
GOOD = {"coco": json.dumps(COCO), "karpathy": json.dumps(KARPATHY), "flickr": FLICKR}


@pytest.fixture
def read(tmp_path):
    (tmp_path / "val2014").mkdir()
    for name in ("val2014/COCO_val2014_000000000007.jpg", "000000000003.jpg", "a.jpg"):
        (tmp_path / name).touch()

    def run(value):
        (tmp_path / "captions").write_text(value if isinstance(value, str) else json.dumps(value))
        return read_captions(tmp_path / "captions", PictureFolders([tmp_path]))

    return run


def test_coco(read, tmp_path):
    """In the order of ``images``; captions in the order of the file; one picture by its name, one by its id."""
    found = read(COCO)
    assert [tuple(e.record) for e in found] == [
        (7, ("Ein Hund läuft. 犬が走る", "A dog runs.\n"), None),
        (3, ("A cat.",), None),
        (5, (), None),
    ]
    assert [e.key for e in found] == ["7", "3", "5"]
    assert found[0].pictures == (tmp_path / "val2014/COCO_val2014_000000000007.jpg",)
    assert found[1].pictures == (tmp_path / "000000000003.jpg",)
    assert missing_pictures(found) == [tmp_path / "000000000005.jpg"]


def test_a_split_without_captions_has_none(read, tmp_path):
    assert [e.record.captions for e in read({"images": COCO["images"]})] == [(), (), ()]
    assert read_references(tmp_path / "captions") == {7: [], 3: [], 5: []}


def test_karpathy(read, tmp_path):
    found = read(KARPATHY)
    assert [tuple(e.record) for e in found] == [
        (7, (), "test"),
        (3, ("Caption 0.",), "train"),  # restval
        (5, ("Caption 0.", "Caption 1."), "val"),
    ]
    assert found[1].pictures == (tmp_path / "000000000003.jpg",)  # named as in COCO 2017
    assert len(missing_pictures(found)) == 1


def test_karpathy_without_coco_ids(read, tmp_path):
    """Those of Flickr8k and Flickr30k."""
    images = [{key: value for key, value in image.items() if key != "cocoid"} for image in KARPATHY["images"]]
    images[0]["filename"] = "a.jpg"
    found = read({"dataset": "flickr8k", "images": images})
    assert [e.record.image_id for e in found] == [0, 1, 2]
    assert found[0].pictures == (tmp_path / "a.jpg",)


def test_flickr8k(read, tmp_path):
    found = read(FLICKR)
    assert [tuple(e.record) for e in found] == [
        (0, ("A dog , running .", 'A "big" dog'), None),
        (1, ('He says "hi"',), None),
    ]
    assert [e.pictures[0] for e in found] == [tmp_path / "b.jpg", tmp_path / "a.jpg"]
    assert [e.record for e in read(FLICKR.replace("\n", "\r\n"))] == [e.record for e in found]


@pytest.mark.parametrize("count", [0, 1, 50])
def test_any_number_of_captions_of_any_length(read, count):
    captions = ["ein Wort — слово 語 " * 1250 + str(number) for number in range(count)]
    annotations = [{"id": i, "image_id": 5, "caption": caption} for i, caption in enumerate(captions)]
    assert read(COCO | {"annotations": annotations})[2].record.captions == tuple(captions)
    rows = "".join(f"c.jpg,{caption}\n" for caption in captions)
    assert read(f"image,caption\n{rows}z.jpg,end\n")[0].record.captions == tuple(captions or ["end"])


def test_packed_files_are_known_by_their_content(read, tmp_path):
    for value in (KARPATHY, FLICKR):
        plain = read(value)
        (tmp_path / "captions").write_bytes(gzip.compress((tmp_path / "captions").read_bytes()))
        assert read_captions(tmp_path / "captions", PictureFolders([tmp_path])) == plain


@pytest.mark.parametrize(
    ("form", "path", "value", "message"),
    [
        (COCO, ["images", 1, "id"], 7, "images[1].id: 7 stands already at [0]"),
        (COCO, ["images", 1, "id"], "3", 'images[1].id: need a whole number, got "3"'),
        (COCO, ["images", 0, "file_name"], "../x.jpg", "images[0].file_name: need a picture's name such as"),
        (COCO, ["images", 0, "file_name"], None, "images[0].file_name: need a picture's name such as"),
        (COCO, ["images", 2, "file_name"], "COCO_val2014_000000000007.jpg", "image 5: has the picture of image 7, "),
        (COCO, ["images"], [], "images: need at least 1, got none"),
        (COCO, ["images"], None, "images: need a list, got null"),
        (COCO, ["annotations", 2, "id"], 30, "annotations[2].id: 30 stands already at [0]"),
        (COCO, ["annotations", 2, "image_id"], 9, "annotations[2].image_id: 9 is not in images (mend the file)"),
        (COCO, ["annotations", 2, "caption"], " ", 'annotations[2].caption: need a text that is not empty, got " "'),
        (COCO, ["annotations", 2], {}, "annotations[2].id: missing; annotations[2].image_id: missing; "),
        (COCO, ["annotations"], None, "annotations: need a list, got null"),
        (KARPATHY, ["images", 1, "cocoid"], 7, "images[1].cocoid: 7 stands already at [0]"),
        (KARPATHY, ["images", 1], {}, "images[1].cocoid: missing; images[1].filename: missing; images[1].split: missi"),
        (KARPATHY, ["images", 1, "split"], "dev", 'images[1].split: need "train" or "restval" or "val" or "test", got'),
        (KARPATHY, ["images", 2, "sentences", 1, "raw"], "", "images[2].sentences[1].raw: need a text"),
        (KARPATHY, ["images", 2, "sentences", 1, "raw"], "\ud800", "images[2].sentences[1].raw: need a text"),
        (KARPATHY, ["images", 2, "filename"], "", "images[2].filename: need a picture's name such as"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_json_is_named_with_its_place(read, tmp_path, form, path, value, message):
    changed = copy.deepcopy(form)
    place = changed
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read(changed)
    assert str(caught.value).startswith(f"{tmp_path}/captions: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "need at least 1 caption, got none"),
        ("image,caption\n", "need at least 1 caption, got none"),
        ("image,comment\na.jpg,x", 'line 1: need image,caption, got "image,comment" (name COCO'),
        ("image,caption\na.jpg,A dog, running\n", "line 2: need image,caption, got 3 values: put a caption"),
        ("image,caption\na.jpg\n", "line 2: need image,caption, got 1 values"),
        ('image,caption\n\na.jpg,"A dog\nb.jpg,x\n', "line 3: unexpected end of data (mend the quotes)"),
        ('image,caption\na.jpg,"A dog" runs\nb.jpg,x\n', "line 2: ',' expected after '\"' (mend the quotes)"),
        ("image,caption\na.jpg,x\nb.jpg, \n", 'line 3: caption: need a text that is not empty, got " "'),
        ("image,caption\n,x\n../b.jpg,y\n", 'line 2: image: need a picture\'s name such as 000000000139.jpg, got ""'),
        ("image,caption\na.jpg," + "x" * 200_000, "line 2: field larger than field limit"),
        ('["images"]', "need an object, got a list of 1"),
        ('{"images": [', "line 1, byte 12: JSON ends in the middle"),
        ('{"images": [NaN]}', "line 1, byte 12: NaN is no finite number"),
        ('{"images": [], "images": []}', 'line 1, byte 15: key "images" stands twice'),
        pytest.param("[" * 100_000, "line 1, byte 100: nested deeper than 100 levels", id="nested"),
        ("\ufeff" + FLICKR, "byte 0: a byte order mark"),
        ("<html>", "line 1: need image,caption, got"),
    ],
)  # fmt: skip
def test_what_is_no_caption_file_is_named_with_its_place(read, tmp_path, text, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        read(text)
    assert str(caught.value).startswith(f"{tmp_path}/captions: ") and "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rng=st.randoms(use_true_random=False), form=st.sampled_from(sorted(GOOD)), as_text=st.booleans())
def test_any_change_reads_or_is_one_line(tmp_path, rng, form, as_text):
    (tmp_path / "a.jpg").touch()
    text = GOOD[form]
    changed = mutate_text(text, rng) if as_text or form == "flickr" else json.dumps(mutate(json.loads(text), rng))
    (tmp_path / "captions").write_text(changed, newline="")
    try:
        found = read_captions(tmp_path / "captions", PictureFolders([tmp_path]))
    except DataError as error:
        assert str(error).startswith(f"{tmp_path}/") and str(error).isprintable()
        return
    assert found and len({e.key for e in found}) == len({e.pictures for e in found}) == len(found)
    assert len(missing_pictures(found)) <= len(found)
    for caption in (caption for e in found for caption in e.record.captions):
        assert caption.strip()
        caption.encode()


@pytest.mark.parametrize(
    ("file", "images", "count", "captions"),
    [
        ("coco_mini/annotations/captions_train2017.json", "coco_mini/train2017", 80, 400),
        ("coco_mini/annotations/captions_val2017.json", "coco_mini", 79, 395),
        ("coco128/captions_val2017.json", "coco128/images", 128, 641),
        ("flickr8k_1k/captions.txt", "flickr8k_1k", 798, 3990),
    ],
)
def test_the_real_files(data_dir, file, images, count, captions):
    found = read_captions(data_dir / file, PictureFolders([data_dir / images]))
    assert (len(found), sum(len(e.record.captions) for e in found)) == (count, captions)
    assert missing_pictures(found) == []
    assert all(e.picture()[:2] == b"\xff\xd8" for e in found)
