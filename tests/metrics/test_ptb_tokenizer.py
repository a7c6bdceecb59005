"""The tokenizer against the outputs of Stanford's, and scores from raw texts against published ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mhmoe_vl.metrics.captions import CaptionScores, score_captions
from mhmoe_vl.metrics.ptb_tokenizer import tokenize


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        # As in the outputs of the Java program for COCO.
        ("A purple bus can't be missed on the city streets.", "a purple bus ca n't be missed on the city streets"),
        ("A close up picture of a brown bear's face.", "a close up picture of a brown bear 's face"),
        ('A sign that says "Abbey Road NW8".', "a sign that says abbey road nw8"),
        ('A parking meeter next to a wall that reads "tie."', "a parking meeter next to a wall that reads tie"),
        ("A class of the Goodmayes Boys' School in 1929.", "a class of the goodmayes boys school in 1929"),
        ("a Halloween Jack o' lantern", "a halloween jack o lantern"),
        ("mounted upside-down on it's post. ", "mounted upside-down on it 's post"),
        ("Some cars are exiting onto Sunset Blvd.", "some cars are exiting onto sunset blvd."),
        ("The Fort York Blvd. sign", "the fort york blvd. sign"),
        ("in a St. Patrick hat by a Ft. Spokane team", "in a st. patrick hat by a ft. spokane team"),
        ("a t.v. is on. ", "a t.v. is on"),
        ("a big car is parked.A water hydrant", "a big car is parked.a water hydrant"),
        ("food to an elephant/", "food to an elephant /"),
        ("tennis p;ayer", "tennis p ayer"),
        ("on the wall\nabove; flanked by", "on the wall above flanked by"),
        ("A grey cat travelling to the centre", "a grey cat travelling to the centre"),
        # Contractions.
        ("we'll they've I'd you're I'm", "we 'll they 've i 'd you 're i 'm"),
        ("won't isn’t cannot gonna", "wo n't is n't can not gon na"),
        ("'tis, y'all", "'t is y' all"),
        ("five o'clock, O'Brien's, rock 'n' roll", "five o'clock o'brien 's rock 'n' roll"),
        # Marks.
        ("a dog (black) and [two] {cats}", "a dog -lrb- black -rrb- and -lsb- two -rsb- -lcb- cats -rcb-"),
        ("“well” ‘done’ — so… he said -- yes...", "well done so he said yes"),
        ("Really?! Yes!! Now.", "really ?! yes !! now"),
        ("B&W, cats & dogs &amp; 50% of #1 + 2", "b&w cats & dogs & 50 % of # 1 + 2"),
        ("----- and ---- _", "----- and _"),
        ("a 🐱 cat", "a cat"),
        # Numbers and compounds.
        ("his/her T-shirt and a 7-year-old's", "his/her t-shirt and a 7-year-old 's"),
        ("12:55, 1,000.5 -3 20-25 and £20 or US$5", "12:55 1,000.5 -3 20-25 and £ 20 or us$ 5"),
        ("no. 5 is no. It is 1/2", "no. 5 is no it is 1/2"),
        ("plan B. The plan of B. Jones", "plan b the plan of b. jones"),
        ("Café crêpes, cafe\u0301", "café crêpes cafe\u0301"),
        ("see www.example.com/a.html, or http://b.org/c?d=1.", "see www.example.com/a.html or http://b.org/c?d=1"),
        ("an <unk> at me@here.org with #fun @home", "an <unk> at me@here.org with #fun @home"),
        ("", ""),
        (" . , ; : ! ? -- ... ' \" ", ""),
    ],
)
def test_tokens(text: str, tokens: str) -> None:
    assert tokenize(text) == tokens


def test_long_and_odd_texts_are_read_in_passing() -> None:
    assert tokenize("cat " * 5000).split() == ["cat"] * 5000
    for text in ("a" * 5000, "a." * 2500, "a-" * 2500, "1," * 2500, "'" * 5000, "a'" * 2500, "<" * 5000):
        assert tokenize(text) or text[0] == "'"


def leave_one_out(data_dir: Path) -> tuple[dict[int, list[str]], dict[int, str]]:
    """Raw references and candidates of the known case made from COCO val2017."""
    known = data_dir / "coco_captions_val2017" / "known_scores"
    split = json.loads((known / "leave_one_out_split.json").read_text())
    references: dict[int, list[str]] = {image: [] for image in split["image_ids"]}
    left_out = set(split["excluded_annotation_ids"])
    for annotation in json.loads((known.parent / "captions_val2017.json").read_text())["annotations"]:
        if annotation["image_id"] in references and annotation["id"] not in left_out:
            references[annotation["image_id"]].append(annotation["caption"])
    results = json.loads((known / "leave_one_out_results.json").read_text())
    return references, {entry["image_id"]: entry["caption"] for entry in results}


def test_tokens_of_coco_are_those_of_the_java_program(data_dir: Path) -> None:
    references, candidates = leave_one_out(data_dir)
    tokens = json.loads((data_dir / "coco_captions_val2017" / "known_scores" / "tokenized.json").read_text())
    ours = {
        "references": {str(image): [tokenize(text) for text in texts] for image, texts in references.items()},
        "candidates": {str(image): [tokenize(text)] for image, text in candidates.items()},
    }
    assert ours == tokens


def score(references: dict, candidates: dict) -> CaptionScores:
    tokens = {image: [tokenize(text) for text in texts] for image, texts in references.items()}
    return score_captions(tokens, {image: tokenize(text) for image, text in candidates.items()})


@pytest.fixture(scope="module")
def e2e_references(data_dir: Path) -> dict[int, list[str]]:
    """Token strings of the references of the E2E challenge's test set."""
    data = json.loads((data_dir / "caption_known" / "e2e" / "captions_e2e_test.json").read_text())
    references: dict[int, list[str]] = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        references[annotation["image_id"]].append(tokenize(annotation["caption"]))
    return references


@pytest.mark.parametrize("system", ["tnt1", "tgen"])
def test_e2e_challenge(data_dir: Path, e2e_references: dict[int, list[str]], system: str) -> None:
    results, expected, items = (
        json.loads((data_dir / "caption_known" / "e2e" / f"{name}.json").read_text())
        for name in (f"{system}_results", "expected", "tnt1_per_item")
    )
    scores = score_captions(e2e_references, {entry["image_id"]: tokenize(entry["caption"]) for entry in results})
    for name in ("ROUGE_L", "CIDEr"):  # published with four decimals
        assert scores.corpus[name] == pytest.approx(expected[system][name], abs=5.1e-5), name
        for item in items if system == "tnt1" else ():
            assert scores.per_image[name][item["image_id"]] == pytest.approx(item[name], abs=5.1e-5), (name, item)


@pytest.mark.parametrize("captions", ["good_captions", "bad_captions"])
def test_clipscore_example(data_dir: Path, captions: str) -> None:
    folder = data_dir / "caption_known" / "clipscore_example"
    references, candidates, expected = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("refs", captions, "expected")
    )
    for name, value in score(references, candidates).corpus.items():
        assert value == pytest.approx(expected[captions][name], abs=5.1e-5), name


def test_nlg_eval_example(data_dir: Path) -> None:
    folder = data_dir / "caption_known" / "nlg_eval_example"
    hyp, *refs = ((folder / f"{name}.txt").read_text().splitlines() for name in ("hyp", "ref1", "ref2"))
    scores = score(dict(enumerate(zip(*refs, strict=True))), dict(enumerate(hyp)))
    expected = json.loads((folder / "expected.json").read_text())
    for name, value in scores.corpus.items():
        assert value == pytest.approx(expected[name], abs=5.1e-7), name
