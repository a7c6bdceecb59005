"""routing.html in a real browser: what is shown equals the data, and nothing written by others runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from known_router import drawn_colors, known_choices, write_run

from mhmoe_vl.analysis import visualize as module
from mhmoe_vl.analysis.routing_page import Shown, render
from mhmoe_vl.analysis.samples import Item
from mhmoe_vl.analysis.trace import LayerTrace, RoutingTrace, TokenTrace
from mhmoe_vl.config import EncoderConfig
from mhmoe_vl.models.factory import build_encoder

pytestmark = pytest.mark.slow
TEXTS = ("a dog", "dog on grass")
PAYLOADS = [
    "<script>window.pwned=1</script>", "</script><script>window.pwned=1</script>", "<img src=x onerror=window.pwned=1>",
    "\"><img src=x onerror=window.pwned=1>",
    "'><svg/onload=window.pwned=1>", "<svg><script>window.pwned=1</script></svg>",
    "javascript:window.pwned=1", "<a href=javascript:window.pwned=1>dog</a>", "<iframe srcdoc='<b>x</b>'></iframe>",
    "<!--", "-->", "<!-- <script>", "]]>", "<![CDATA[", "&lt;b&gt;", "&amp;#60;", "&#x3C;script&#x3E;", "{{ 7 * 7 }}",
    "{% raw %}", "{# note #}", "${window.pwned=1}", "`window.pwned=1`", "\\u003cscript\\u003e", "\\", "\"", "'",
    "\u202egod a\u202c", "\u2066\u2067dog\u2069", "\u05db\u05dc\u05d1 \u200f!", "\u0643\u0644\u0628",
    "\U0001f415\u200d\U0001f9ba",
    "\u2028window.pwned=1\u2029", "\x00\x07\x1b[31mred", "a\r\nb\tc", "<style>*{display:none}</style>",
    "<base href=http://x.invalid>",
    "<meta http-equiv=refresh content=0;url=http://x.invalid>",
    "<body onload=window.pwned=1>", "__proto__", "constructor",
]  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """Pages of an encoder whose routing is known: alone, and beside another one."""
    folder = tmp_path_factory.mktemp("pages")
    saved = write_run(folder)
    torch.manual_seed(0)
    ffn = {"kind": "moe", "num_experts": 300, "hidden_dim": 2, "top_k": 3}
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 1, "img_size": 64, "patch_size": 32, "vocab_size": 49410}
    config = {**sizes, "max_text_len": 8, "expert_pool": "per_modality", "ffn": ffn}
    build_encoder(EncoderConfig.model_validate(config)).save_pretrained(folder / "other")
    pictures = [str(folder / "pictures")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_figures", lambda *given: {})
        module.visualize([str(saved)], pictures, TEXTS, out=folder / "one")
        module.visualize([str(saved), str(folder / "other")], pictures, TEXTS, out=folder / "two", capacity=1.0)
    return folder


def choose(page, name: str, value: object, panel: int = 0) -> None:
    """Press a button of a choice."""
    place = "" if name == "Colour by" else f"[data-model='{panel}'] "
    page.click(f"{place}[data-choice='{name}'][data-value='{value}']")


def numbers(page) -> list[list[str]]:
    """The table of numbers of the map."""
    return page.eval_on_selector_all(".numbers tr", "rows => rows.map(row => [...row.cells].map(c => c.textContent))")


def cells(page, panel: int = 0) -> list[list[str]]:
    """Experts and gates of the selection: one list per block, in the order of sub-tokens and choices."""
    rows = f"[data-model='{panel}'] .selection tbody tr"
    each = "rows => rows.map(row => [...row.querySelectorAll('[data-gate]')].map(c => c.textContent))"
    return page.eval_on_selector_all(rows, each)


def title(page, panel: int = 0) -> str:
    return page.text_content(f"[data-model='{panel}'] .what b")


# ------------------------------------------------------------------------------------------ numbers
def test_the_map_shown_is_the_known_one(pages, open_page, keep):
    page = open_page(pages / "one" / "routing.html")
    page.click("text=Numbers of this map")
    for number in range(2):
        experts, _ = known_choices(drawn_colors(number))
        for block in range(2):
            choose(page, "Block", block)
            for sub in range(2):
                choose(page, "Sub-token", sub)
                wanted = experts[block, :, sub, 0].reshape(4, 4)
                assert numbers(page) == wanted.astype(str).tolist()
            choose(page, "Sub-token", -1)
            both = [[f"{a} {b}" for a, b in row] for row in experts[block, :, :, 0].reshape(4, 4, 2)]
            assert numbers(page) == both
        page.keyboard.press("n")
    keep(page, "routing_map")


def test_numbers_shown_equal_the_json(pages, open_page):
    """Every patch and every word, by keyboard: experts, gates, entropies, divergence, counts."""
    layers = json.loads((pages / "one" / "routing.json").read_text())["checkpoints"][0]["layers"]
    page = open_page(pages / "one" / "routing.html")
    for number in range(2):
        page.focus(".picture")
        for key in ["ArrowUp", "ArrowLeft"] * 4:
            page.keyboard.press(key)
        for n in range(16):
            row, column = divmod(n, 4)
            assert title(page) == f"Patch, row {row}, column {column}"
            assert_selection(page, [layer["parts"]["patch"] for layer in layers], number, n)
            for key in ["ArrowRight"] if column < 3 else ["ArrowDown", *["ArrowLeft"] * 3]:
                page.keyboard.press(key)
        page.keyboard.press("t")
        for n in range(-1, len(TEXTS[number].split()) + 2):
            part = "class" if n < 0 else "text"
            assert_selection(page, [layer["parts"][part] for layer in layers], number, max(n, 0))
            page.keyboard.press("ArrowRight")
        page.keyboard.press("n")
    for block, layer in enumerate(layers):
        choose(page, "Block", block)
        shown = page.eval_on_selector_all("[data-sheet] .sheet-head", "heads => heads.map(head => head.textContent)")
        total = f"{layer['num_rows'] * layer['top_k']:,}"
        for expert, count in enumerate(layer["counts"]):
            assert shown[expert].startswith(f"{expert}{count:,} of {total} choices")


def assert_selection(page, parts: list[dict], sample: int, n: int) -> None:
    found = cells(page)
    distinct = page.eval_on_selector_all("[data-divergence]", "cells => cells.map(cell => cell.textContent)")
    entropies = page.eval_on_selector_all(".selection small", "cells => cells.map(cell => cell.textContent)")
    wanted_entropies = []
    for block, part in enumerate(parts):
        experts, gates = np.ravel(part["experts"][sample][n]), np.ravel(part["gates"][sample][n])
        assert found[block] == [f"{e}{g:.4f}" for e, g in zip(experts, gates, strict=True)]
        assert distinct[block] == str(part["divergence"][sample][n])
        wanted_entropies += [f"H {value:.4f}" for value in part["entropy"][sample][n]]
    assert entropies == wanted_entropies


def test_counts_shown_sum_to_rows_times_top_k(pages, open_page):
    page = open_page(pages / "one" / "routing.html")
    tokens = 16 + 1 + len(TEXTS[0].split()) + 2
    for block in range(2):
        choose(page, "Block", block)
        loads = page.eval_on_selector_all("[data-load]", "items => items.map(item => Number(item.dataset.load))")
        assert len(loads) == 4 and sum(loads) == tokens * 2 * 2
        assert f"{tokens * 4} choices = {tokens * 2} sub-tokens × top 2" in page.text_content(".pool")


# ----------------------------------------------------------------------------------------- actions
def test_clicks_and_keys_change_what_is_shown(pages, open_page, keep):
    page = open_page(pages / "one" / "routing.html")
    look = "() => document.querySelector('.picture canvas').toDataURL()"
    box = page.locator(".picture canvas").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.1)
    assert title(page) == "Patch, row 0, column 3"
    page.mouse.move(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.6)
    assert title(page) == "Patch, row 2, column 0"  # shown while the mouse is there
    page.mouse.move(5, 5)
    assert title(page) == "Patch, row 0, column 3"
    seen = {page.evaluate(look)}
    for mode in ("divergence", "mean divergence", "entropy", "gate", "expert"):
        page.keyboard.press("c")
        assert page.get_attribute(f"[data-value='{mode}']", "aria-pressed") == "true"
        seen.add(page.evaluate(look))
    for key, many in (("b", 2), ("s", 3)):
        for _ in range(many):
            page.keyboard.press(key)
            seen.add(page.evaluate(look))
    assert len(seen) >= 8
    page.keyboard.press("e")
    expert = page.get_attribute("[aria-label='Chosen expert'] .badge", "data-expert")
    assert f"Everything expert {expert} of block" in page.text_content("[aria-label='Chosen expert']")
    assert f"expert {expert} of block" in page.text_content("#live") and page.evaluate(look) not in seen
    keep(page, "routing_expert")
    page.keyboard.press("Escape")
    assert page.is_hidden("[aria-label='Chosen expert']")
    page.click("[data-sheet='2'] .badge")
    assert "Everything expert 2" in page.text_content("[aria-label='Chosen expert']")
    page.click("text=close")
    crop = page.locator("[data-sheet='0'] .crops button").last
    sample, patch = (int(crop.get_attribute(name)) for name in ("data-sample", "data-patch"))
    crop.click()
    assert title(page) == f"Patch, row {patch // 4}, column {patch % 4}"
    assert f"{sample + 1} of 2" in page.text_content("#sample")
    before = page.text_content("#sample")
    page.keyboard.press("n")
    assert page.text_content("#sample") != before
    page.click(".tokens button:has-text('dog')")
    assert "dog" in title(page)
    page.keyboard.press("t")
    assert page.evaluate("document.activeElement.className") == "picture"


def test_words_and_patches_of_an_expert_are_its_own(pages, open_page):
    """Expert 2 of block 0 takes blue patches, and "dog" before all other words."""
    page = open_page(pages / "one" / "routing.html")
    choose(page, "Block", 0)
    assert page.text_content("[data-sheet='2'] .words button .theirs") == "dog"
    page.fill("#word", " DOG ")
    found = page.eval_on_selector_all("#found p > span", "all => all.map(node => node.textContent)")
    assert found == ["Block 0:", "14/8", "24/8"]  # experts 1 and 2: the first and second choice of both sub-tokens
    choose(page, "Block", 1)
    assert page.text_content("#found") == "Block 1:14/824/8"  # 3 - 2 and 3 - 1
    page.fill("#word", "<b>cat</b>")
    assert page.text_content("#found") == "Block 1:not among the words shown here"
    choose(page, "Block", 0)
    crops = page.eval_on_selector_all(
        "[data-sheet='2'] .crops button", "all => all.map(b => [Number(b.dataset.sample), Number(b.dataset.patch)])"
    )
    for sample, patch in crops[:3]:
        experts, _ = known_choices(drawn_colors(sample))
        assert 2 in experts[0, patch]


def test_two_checkpoints_have_one_selection(pages, open_page, keep):
    page = open_page(pages / "two" / "routing.html", viewport={"width": 1500, "height": 1000})
    box = page.locator("[data-model='0'] canvas").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.1)
    page.mouse.move(5, 5)
    assert (title(page), title(page, 1)) == ("Patch, row 0, column 3", "Patch, row 0, column 1")
    page.click("[data-model='1'] .tokens button:has-text('dog')")
    assert title(page) == title(page, 1) != ""
    found = json.loads((pages / "two" / "routing.json").read_text())["checkpoints"][1]["layers"]
    text = next(layer["parts"]["text"] for layer in found if layer["pool"] == "text")
    n = int(page.get_attribute("[data-model='1'] .tokens [aria-pressed=true]", "data-token"))
    for shown, expert, gate, kept in zip(
        cells(page, 1)[0], *(np.ravel(text[name][0][n]) for name in ("experts", "gates", "kept")), strict=True
    ):
        assert shown == f"{expert}{gate:.4f}" + ("" if kept else "dropped")
    assert "dropped by capacity factor 1" in page.text_content("#panels")
    page.click("text=more of the 300 experts >> nth=0")
    keep(page, "routing_two")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(pages, open_page, keep, scheme):
    page = open_page(
        pages / "one" / "routing.html",
        viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, color_scheme=scheme,
    )  # fmt: skip
    box = page.locator(".picture canvas").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] * 0.1, box["y"] + box["height"] * 0.1)
    assert title(page) == "Patch, row 0, column 0"
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 26)"
    assert dark == (scheme == "dark")
    keep(page, f"routing_phone_{scheme}")


# ---------------------------------------------------------------------------------------- hostile text
def test_what_others_wrote_is_shown_as_text_and_runs_nothing(tmp_path, open_page, keep):
    """Forty payloads as names, class names, captions, words and, all together, as the name of the checkpoint."""
    assert len(PAYLOADS) == len(set(PAYLOADS)) == 40
    items = [Item(name=p, place=p, label=p, text=p, picture=b"") for p in PAYLOADS]
    trace = small_trace([["<start>", p, p[::-1], "<end>"] for p in PAYLOADS])
    model = " ".join(PAYLOADS)
    places = [(number, number) for number in range(40)]
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    page_text = render(items, [picture] * 40, [Shown(model, trace, places)])
    path = tmp_path / "routing.html"
    path.write_text(page_text)
    assert page_text.count("<script") == 2 and page_text.count("</script") == 2
    page = open_page(path)
    assert page.text_content("#about b") == model
    for number, payload in enumerate(PAYLOADS):
        shown = page.eval_on_selector_all("#sample .theirs", "all => all.map(node => node.textContent)")
        assert shown == [payload] * 3, number
        tokens = page.eval_on_selector_all(".tokens .theirs", "all => all.map(node => node.textContent)")
        stripped = page.evaluate("texts => texts.map(text => text.trim())", [payload, payload[::-1]])
        assert tokens[2:4] == stripped
        page.click(".tokens button >> nth=2")
        assert stripped[0] in title(page)
        page.keyboard.press("n")
    page.click("[data-sheet='0'] .badge")
    words = page.eval_on_selector_all(".words .theirs", "all => all.map(node => node.textContent)")
    assert len(words) > 8
    assert page.evaluate("window.pwned") is None
    counted = page.evaluate(
        "['script', 'iframe', 'base', 'svg', 'a'].map(tag => document.querySelectorAll(tag).length)"
    )
    assert counted == [2, 0, 0, 0, 0]
    keep(page, "routing_hostile")


def small_trace(pieces: list[list[str]], num_experts: int = 2) -> RoutingTrace:
    """One layer, experts 0 and 1 in use: every picture has one patch and the class token."""
    rng = np.random.default_rng(0)

    def tokens(length: int) -> TokenTrace:
        found = TokenTrace.blank(len(pieces), length, 1, 1)
        found.experts[:] = rng.integers(0, 2, found.experts.shape)
        found.gates[:], found.kept[:], found.present[:], found.counted[:] = 0.5, True, True, True
        return found

    layer = LayerTrace(
        0, "joint", num_experts, 1, 1, {"class": tokens(1), "patch": tokens(1), "text": tokens(len(pieces[0]))}
    )
    return RoutingTrace(
        layers=(layer,), grid=(1, 1), num_images=len(pieces), num_texts=len(pieces), num_pairs=len(pieces),
        pieces=tuple(map(tuple, pieces)), capacity_factor=None,
    )  # fmt: skip


def test_the_policy_allows_the_one_script_only(tmp_path, open_page, browser):
    """A script that got into the page all the same is not run: the policy names hashes."""
    page_text = render([Item("a", "a", text="x")], [None], [Shown("m", small_trace([["x"]]), [(None, 0)])])
    assert "default-src 'none'" in page_text and "unsafe" not in page_text.split("<style>")[0]
    path = tmp_path / "routing.html"
    path.write_text(page_text.replace("</main>", "</main><script>window.pwned = 1</script>"))
    context = browser.new_context()
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("window.pwned") is None
    assert page.text_content("h1") == "Where sub-tokens go"
    context.close()


def test_256_experts_look_different_and_are_numbered(tmp_path, open_page, keep):
    """Colour, pattern, its mark or its size; and without colours within any eight that follow each other."""
    path = tmp_path / "routing.html"
    path.write_text(render([Item("a", "a", text="x")], [None], [Shown("m", small_trace([["x"]], 256), [(None, 0)])]))
    page = open_page(path)
    look = "b => [b.textContent, ...['Color', 'Image', 'Size'].map(part => getComputedStyle(b)['background' + part])]"
    looks = page.eval_on_selector_all(".loads .badge", f"all => all.map({look})")
    assert [number for number, *_ in looks] == [str(expert) for expert in range(256)]
    assert len({tuple(rest) for _, *rest in looks}) == 256
    assert all(len({image for _, _, image, _ in looks[i : i + 8]}) == 8 for i in range(0, 256, 8))
    keep(page, "routing_256")
