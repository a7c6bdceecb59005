"""The report page: every number is on it, nothing foreign gets into it."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mhmoe_vl.analysis import report
from mhmoe_vl.analysis.gallery import MAX_CARDS, write_gallery
from mhmoe_vl.analysis.report import write_report
from mhmoe_vl.analysis.run_log import read_metrics
from mhmoe_vl.errors import ConfigError, DataError

VOID = {"meta", "img", "br", "path", "rect", "image", "polyline", "input"}


class Page(HTMLParser):
    """Tags with attribute names, attribute values, text, and the cells of each table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.open: list[str] = []
        self._in_cell = False
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *(name for name, _ in attrs)))
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self._in_cell:
            self.tables[-1][-1][-1] += data

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def page_of(run: Path, **options) -> Page:
    return Page(write_report(run, **options).read_text(encoding="utf-8"))


CONFIG = "task: {kind: masked_modeling}\ntrain: {steps: 30}\n"


def make_run(folder: Path, lines: list[dict], config: str = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def train_line(step: int, term: str = "image", pool: str = "blocks.1.ffn", reason: str = "checksum") -> dict:
    return {
        "step": step, "split": "train", "time": f"2026-01-02T03:{step:02d}:00+00:00", "loss": 40 / step,
        f"loss/{term}": 50 / step, "balance_loss": 1.25, "grad_norm": 0.5 + step, "lr": 3e-4,
        "images_per_s": 100.0 + step, "memory_mb": 2048.0, f"bad/{reason}": step // 20,
        f"load/{pool}": [0.625, 0.375, 0.0], f"load_by_stream/{pool}": [[0.5, 0.5, 0.0], [0.75, 0.25, 0.0]],
        f"entropy/{pool}": 0.9, f"dead/{pool}": 1, f"dropped/{pool}": 0.0,
    }  # fmt: skip


def val_line(step: int, term: str = "image") -> dict:
    return {
        "step": step, "split": "val", "time": "2026-01-02T03:00:00+00:00", f"perplexity/{term}": 2000.0 / (step + 1),
        f"accuracy/{term}": 0.015625 * step, "perplexity": 1000.0 / (step + 1),
    }  # fmt: skip


def card(**changes) -> dict:
    return {"images": [], "caption": "", "right": None, "rows": [], "bars": []} | changes


def make_gallery(run: Path, cards: list[dict]) -> None:
    """A gallery whose cards without pictures get a red one."""
    Image.new("RGB", (64, 32), "red").save(run / "red.png")
    write_gallery(run, [entry | {"images": entry["images"] or [run / "red.png"]} for entry in cards])


@pytest.fixture
def run(tmp_path):
    lines = [val_line(0), train_line(10), val_line(10), train_line(20), train_line(30), val_line(30)]
    return make_run(tmp_path / "run-7", lines)


def test_every_number_stands_in_a_table(run):
    cells = {cell for table in page_of(run).tables for row in table for cell in row}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        for key, value in line.items():
            if key not in ("split", "time") and not key.startswith(("bad/", "load_by_stream/")):
                for number in value if isinstance(value, list) else [value]:
                    assert f"{number:.6g}" in cells, key
    assert {"0.5", "0.75", "0.25"} <= cells  # shares of image and text rows


def test_key_numbers(run):
    text = page_of(run).text
    tiles = ("steps30of 30", "perplexity32.26lowest 32.26 at step 30", "training loss1.333from 4",
             "images per second120median", "memory2.0 GBhighest", "duration30 minsince 2026-01-02 03:00",
             "dead experts1of 3 at the end", "dead: 2")  # fmt: skip
    for tile in tiles:
        assert tile in text
    assert "highest 1000 at step 0" in page_of(run, metric="perplexity", higher_is_better=True).text
    assert "lowest 0 at step 0" in page_of(run, metric="accuracy/image").text


def test_lines_are_drawn_at_hand_computed_places(run):
    points = page_of(run).values("points")
    assert "60,60 260,160 460,193.3" in points  # loss 4, 2, 4/3 between ticks 1 and 5
    assert "60,210 260,110 460,10" in points  # images per second 110, 120, 130


def test_skipped_samples_are_counted(run):
    assert [["what", "first at step", "count"], ["checksum", "20", "1"]] in page_of(run).tables


def test_the_best_values_name_their_steps(run):
    tables = page_of(run).tables
    row = ["perplexity", "1000", "32.2581", "32.2581 (step 30)", "1000 (step 0)"]
    assert any(row in table for table in tables)


def test_same_folder_same_bytes(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert not (run / "report.html.part").exists()


def test_nothing_is_loaded_from_elsewhere(run):
    make_gallery(run, [card(right=True), card(right=False)])
    page = page_of(run)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page.values("content")
    assert all(value.startswith("data:image/") for value in page.values("href") + page.values("src"))
    assert not {"script", "link", "iframe", "object", "a", "form"} & {tag for tag, *_ in page.tags}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "url(" not in (run / "report.html").read_text() and "@import" not in (run / "report.html").read_text()


# ------------------------------------------------------------------------------------- hostile values
PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</style><style>*{display:none}",
    "--></textarea></title></details></table><b>",
    "javascript:alert(1)",
    "{{ 7*7 }}{% raw %}${7*7}",
    "\x1b]0;owned\x07\x00\x9b31m\u202e",
    "&lt;b&gt;&#x3c;i>",
    "\ud800 lone surrogate",
    "\u200f\u202e\u2066 שלום עולם",
    "👩\u200d🚒 🐟",
    "Donaudampfschiff" * 40,
]


def hostile_run(folder: Path, word: str) -> Path:
    """A run with ``word`` in every place that holds text."""
    lines = [val_line(0, word), train_line(20, word, word, word), val_line(20, word)]
    printable = "".join(c for c in word if c.isprintable())
    make_run(folder, lines, f"task: {{kind: {json.dumps(printable)}}}\n")
    (folder / "summary.json").write_text(json.dumps({word: word, "n": 1}))
    (folder / "predictions").mkdir()
    name = printable.replace("/", "_")[:80]
    (folder / "predictions" / f"{name}.jsonl").write_text(json.dumps({"id": 1, word: word}) + "\n")
    make_gallery(
        folder, [card(caption=word, right=False, rows=[[word, word]], bars=[[word, 0.5], [word, float("nan")]])]
    )
    return folder


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_text_stays_text(tmp_path, payload):
    name = "".join(c for c in payload if c.isprintable()).replace("/", "_")[:80]
    tame, hostile = page_of(hostile_run(tmp_path / "tame", "word")), page_of(hostile_run(tmp_path / name, payload))
    assert hostile.tags == tame.tags  # no foreign node, no foreign attribute
    for name in ("class", "style", "src", "href", "points", "d", "http-equiv", "content"):
        assert sorted(hostile.values(name)) == sorted(tame.values(name))
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in payload)
    assert hostile.text.count(shown) >= 8
    gallery = hostile.text[hostile.text.index("Examples") : hostile.text.index("Predictions")]
    assert gallery.count(shown) == 5  # caption, name and value of a row, two bars
    everything = hostile.text + "".join(value or "" for _, value in hostile.attributes)
    assert all(c.isprintable() or c == "\n" for c in everything)


# ------------------------------------------------------------------------------------- damaged folders
def test_a_run_with_only_step_0(tmp_path):
    page = page_of(make_run(tmp_path / "new", [val_line(0)]))
    # Perplexities 2000 and 1000 between ticks 1000 and 2000, accuracy 0 between 0 and 1: one dot each.
    assert page.values("points") == ["60,210 60,210", "60,10 60,10", "60,210 60,210"]
    assert "Experts" not in page.text and "Validation" in page.text


def test_a_run_without_lines(tmp_path):
    assert "Training report" in page_of(make_run(tmp_path / "new", [])).text


def test_a_cut_last_line_is_left_out_and_said(run):
    whole = page_of(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "split": "train", "los')
    cut = page_of(run)
    assert "Left out: 1 unreadable line of metrics.jsonl (line 7)" in cut.text
    assert cut.tables == whole.tables


@pytest.mark.parametrize(
    "line", ["\x00\x00", "[]", "7", '{"step": true, "split": "train"}', '{"split": "val"}', '{"step": 1, "split": []}',
             '{"step": -1, "split": "val"}', '{"step": 1e3, "split": "val"}', "[" * 100_000, "9" * 5000, "\udcff"]
)  # fmt: skip
def test_damaged_lines_are_noted(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((line + "\n" + json.dumps(val_line(3)) + "\n").encode(errors="surrogateescape"))
    log = read_metrics(path)
    assert log.unreadable == [1] and log.val["perplexity"].steps == [3]


def test_odd_values_are_gaps_or_left_out(tmp_path):
    odd = {"step": 5, "split": "train", "loss": None, "lr": 10**400, "grad_norm": float("nan"), "z_loss": "high",
           "x": True, "load/a": [0.5, None], "load/b": [], "load/c": [[1.0]], "load/d": {"0": 1}, "load/e": [0.5, 0.5],
           "load_by_stream/e": [[1.0]], "time": 7}  # fmt: skip
    run = make_run(tmp_path / "odd", [odd])
    log = read_metrics(run / "metrics.jsonl")
    assert sorted(log.train) == ["grad_norm", "loss", "lr"] and list(log.pools) == ["e"]
    assert not log.pools["e"].by_stream
    write_report(run)


def test_a_resumed_run_replaces_its_old_lines(tmp_path):
    again = train_line(20) | {"loss": 7.5, "load/blocks.1.ffn": [1, 0, 0]}
    run = make_run(tmp_path / "run", [train_line(10), train_line(20), train_line(30), again])
    log = read_metrics(run / "metrics.jsonl")
    assert log.train["loss"].steps == [10, 20] and log.train["loss"].values == [4.0, 7.5]
    assert log.pools["blocks.1.ffn"].load[1].tolist() == [1, 0, 0] and log.pools["blocks.1.ffn"].steps == [10, 20]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_missing_file_is_one_clear_error(run, name):
    (run / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: missing \(name the folder of a training run\)$"):
        write_report(run)


def test_an_unreadable_configuration_is_one_clear_error(run):
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yaml:\d+: not readable as YAML"):
        write_report(run)


# -------------------------------------------------------------------------------------- optional files
def test_summary_puts_scores_in_rows(run):
    scores = {"p/yes/no/before": 9.5, "p/yes/no/after": 2.0, "p/yes/no/baseline": 4.0, "a/after": None}
    (run / "summary.json").write_text(json.dumps({"steps": 30, **scores, "x": "y"}))
    tables = page_of(run).tables
    assert tables[0] == [["steps", "30"], ["x", "y"]]
    assert tables[1] == [["score", "step 0", "end", "no model"], ["p/yes/no", "9.5", "2", "4"], ["a", "", "", ""]]


@pytest.mark.parametrize("text", ["[1]", '{"a": {"b": 1}}', "{"])
def test_a_wrong_summary_is_an_error(run, text):
    (run / "summary.json").write_text(text)
    with pytest.raises(DataError, match=r"summary\.json: "):
        write_report(run)


CARD = card(
    caption="what is in the net?", right=False, rows=[["answer", "ball"], ["true answer", "fish"], ["score", 0.3]],
    bars=[["ball", 0.625], ["fish", 0.25], ["", float("inf")]],
)  # fmt: skip


def test_a_card_shows_all_it_holds(run):
    make_gallery(run, [CARD])
    page = page_of(run)
    assert [["answer", "ball"], ["true answer", "fish"], ["score", "0.3"]] in page.tables
    text = " ".join(page.text.replace("\xa0", " ").split())
    assert "\N{BALLOT X} wrong what is in the net?" in text
    assert "ball62.5 % fish \N{CHECK MARK}25.0 % not finite" in text
    assert page.values("style") == ["width: 62.5%", "width: 25.0%", "width: 0.0%"]
    assert ("true" in page.values("class")) and page.values("alt") == ["picture 1 of 1"]


def test_a_card_shows_its_pictures_from_left_to_right(run):
    for color in ("lime", "blue"):
        Image.new("RGB", (640, 320), color).save(run / f"{color}.png")
    make_gallery(run, [card(images=[run / "blue.png", run / "lime.png"]), card(images=[run / "none.png"])])
    page = page_of(run)
    assert page.values("alt") == ["picture 1 of 2", "picture 2 of 2"] and page.text.count("no picture") == 1
    left, right = (Image.open(io.BytesIO(base64.b64decode(value.partition(",")[2]))) for value in page.values("src"))
    assert left.size == right.size == (320, 160)
    assert left.getpixel((9, 9))[2] > 200 > left.getpixel((9, 9))[1] and right.getpixel((9, 9))[1] > 200


def test_cards_are_filtered_by_style_alone(run):
    make_gallery(run, [card(right=True), card(right=True), card(right=False), card()])
    page = page_of(run)
    cards = [value for value in page.values("class") if value.split()[0] == "card"]
    assert cards.count("card is-right") == 2 and cards.count("card is-wrong") == 1
    assert page.values("id") == page.values("for") == ["show-all", "show-right", "show-wrong"]
    assert all(text in page.text for text in ("all 4", "right 2", "wrong 1"))
    assert [tag for tag in page.tags if tag[0] == "input" and "checked" in tag] == [
        ("input", "type", "name", "id", "checked")
    ]
    html = (run / "report.html").read_text()
    assert "#show-right:checked ~ .gallery .card:not(.is-right)" in html
    assert html.index('id="show-wrong"') < html.index('<div class="gallery">')  # what ~ asks for


def test_without_right_and_wrong_there_is_no_filter(run):
    make_gallery(run, [card(caption="a fish"), card()])
    page = page_of(run)
    assert "a fish" in page.text and not page.values("for")


def test_at_most_48_cards_are_shown(run):
    make_gallery(run, [card(right=True)] * 60)
    page = page_of(run)
    assert len(page.values("src")) == MAX_CARDS == 48
    assert "The first 48 of 60." in page.text and "all 48" in page.text


def test_same_gallery_same_bytes(run):
    make_gallery(run, [CARD])
    first = write_report(run).read_bytes()
    make_gallery(run, [CARD])
    assert write_report(run).read_bytes() == first


def test_predictions_show_the_first_records_of_the_last_file(run):
    (run / "predictions").mkdir()
    (run / "predictions" / "a.json").write_text("[broken")
    records = "".join(json.dumps({"id": i, "codes": [i] * 9999, "answer": "yes"}) + "\n" for i in range(50))
    (run / "predictions" / "b.jsonl").write_text(records)
    text = " ".join(page_of(run).text.split())
    shown = [f"id {i} codes [{i}, {i}, {i}, ...] answer 'yes'" for i in range(50)]
    assert " ".join(shown[: report.MAX_RECORDS]) in text and shown[report.MAX_RECORDS] not in text
    (run / "predictions" / "b.jsonl").unlink()
    assert "a.json" in page_of(run).text


def test_a_record_of_any_shape_stays_short(run):
    (run / "predictions").mkdir()
    deep = json.loads("[" * 500 + "]" * 500)
    record = {
        "deep": deep,
        "long": "x" * 10_000,
        "pairs": [["yes", 0.61234567], ["no", 0.25]],
        "k" * 999: None,
        "o": {},
    }
    (run / "predictions" / "a.jsonl").write_text(json.dumps(record | {f"n{i}": 10**i for i in range(99)}))
    text = page_of(run).text
    records = text[text.index("deep") : text.index("Configuration")]
    assert "deep [[[[...]]]]" in records and "pairs [['yes', 0.6123], ['no', 0.25]]" in records
    assert "n10 10000000000" in records and "n11" not in records and "... and 88 more" in " ".join(records.split())
    assert len(records) < 1000


def test_titles_keep_the_capitals_of_scores(tmp_path):
    line = {"step": 1, "split": "val", "CIDEr": 1.0, "Bleu_4": 0.25, "accuracy/yes/no": 50.0, "accuracy": 40.0}
    run = make_run(tmp_path / "run", [line])
    page = page_of(run)
    assert page.values("aria-label") == ["CIDEr", "Bleu 4", "Accuracy"]
    assert ["step", "accuracy", "yes/no"] in [table[0] for table in page.tables]


def test_any_validation_number_gets_a_figure(tmp_path):
    values = {"codebook_usage": 0.5, "code_perplexity": 90.0, "error/a": 1, "error/b": 2}
    lines = [{"step": step, "split": "val", **values} for step in (0, 9)]
    page = page_of(make_run(tmp_path / "tokenizer", lines))
    assert page.values("aria-label") == ["Codebook usage", "Code perplexity", "Error"]


def test_many_pools_go_over_several_figures(tmp_path):
    line = {"step": 1, "split": "train", **{f"entropy/pool{i}": float(i) for i in range(17)}}
    page = page_of(make_run(tmp_path / "run", [line]))
    assert page.values("aria-label") == [f"Router entropy (nats) ({i} of 3)" for i in (1, 2, 3)]


@pytest.mark.slow
def test_a_long_run_gives_a_small_page(tmp_path):
    lines = [train_line(10) | {"step": step, "loss": step % 97 / 7} for step in range(1, 100_001)]
    assert write_report(make_run(tmp_path / "long", lines)).stat().st_size < 2_000_000


def test_a_run_of_ten_thousand_lines_gives_a_small_page(tmp_path):
    lines = [{"step": s, "split": "train", "loss": s % 97 / 7, "load/p": [0.25] * 4} for s in range(1, 10_001)]
    assert write_report(make_run(tmp_path / "long", lines)).stat().st_size < 200_000
