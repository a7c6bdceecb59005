"""tools/visualize_routing.py: what it reads and writes, and mistakes as one line with nothing half-written."""

from __future__ import annotations

import base64
import csv
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from known_router import drawn_colors, known_choices, known_encoder, picture, write_run
from PIL import Image

from mhmoe_vl.analysis import trained
from mhmoe_vl.analysis import visualize as module
from mhmoe_vl.analysis.samples import gather
from mhmoe_vl.config import EncoderConfig
from mhmoe_vl.data.text import create_text_tokenizer
from mhmoe_vl.data.writing import write_shard
from mhmoe_vl.errors import DataError
from mhmoe_vl.models.factory import build_encoder

TEXTS = ("a dog", "dog on grass")


@pytest.fixture(scope="module", autouse=True)
def _one_tokenizer():
    """The vocabulary takes a second to read: once is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained, "create_text_tokenizer", functools.cache(create_text_tokenizer))
        yield


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch, written):
    """They are drawn once, in ``written``."""
    monkeypatch.setattr(module, "_figures", lambda *given: {})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A saved encoder whose routing is known, and two pictures."""
    folder = tmp_path_factory.mktemp("known")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def written(world) -> Path:
    """What the tool writes of both pictures with captions."""
    out = world / "out"
    pictures = [str(world / "pictures" / f"{number}.png") for number in range(2)]
    assert module.visualize([str(world / "saved")], pictures, TEXTS, out=out) == 0
    return out


def page_data(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(found[1])


def unpack(model: dict, number: int) -> list[dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Experts, words of gates and entropies of a sample by layer and part, as routing_page.py describes them."""
    sample = model["samples"][number]
    data, place, layers = base64.b64decode(sample["choices"]), 0, []
    lengths = {"class": 1, "patch": np.prod(model["grid"] or [0]), "text": len(sample["pieces"])}
    for layer, bits in zip(model["layers"], sample["passes"], strict=True):
        found = {}
        for bit, part in enumerate(("class", "patch", "text")):
            if not bits >> bit & 1:
                continue
            rows = (lengths[part], layer["num_subtokens"])
            types = [("<u1" if layer["num_experts"] <= 256 else "<u2", (*rows, layer["top_k"]))]
            arrays = []
            for kind, shape in [*types, ("<u2", (*rows, layer["top_k"])), ("<u4", rows)]:
                size = int(np.prod(shape)) * np.dtype(kind).itemsize
                arrays.append(np.frombuffer(data[place : place + size], kind).reshape(shape).astype(int))
                place += size
            found[part] = tuple(arrays)
        layers.append(found)
    assert place == len(data)
    return layers


# ---------------------------------------------------------------------------------------- what is written
def test_the_known_map_reaches_the_data_of_the_page(written):
    """Patch colour decides sub-token 0, position sub-token 1; block 1 numbers experts the other way round."""
    model = page_data(written / "routing.html")["models"][0]
    for number in range(2):
        experts, gates = known_choices(drawn_colors(number))
        for block, layer in enumerate(unpack(model, number)):
            assert (layer["patch"][0] == experts[block]).all()
            np.testing.assert_allclose(layer["patch"][1] / 10_000, gates[block], atol=5.1e-5)


def test_page_json_and_csv_say_the_same(written):
    values = json.loads((written / "routing.json").read_text())
    model, (checkpoint,) = page_data(written / "routing.html")["models"][0], values["checkpoints"]
    lines = list(csv.DictReader((written / "routing.csv").read_text().splitlines()))
    found = {tuple(line[name] for name in module.COLUMNS[1:8]): line for line in lines}
    assert len(found) == len(lines) == sum(layer["num_rows"] * layer["top_k"] for layer in checkpoint["layers"])
    for number, (image, text) in enumerate(checkpoint["places"]):
        for layer, packed in zip(checkpoint["layers"], unpack(model, number), strict=True):
            for part, (experts, words, entropy) in packed.items():
                tokens = {k: np.array(v[text if part == "text" else image]) for k, v in layer["parts"][part].items()}
                length = len(experts)
                assert (tokens["experts"][:length] == experts).all()
                assert (np.rint(tokens["gates"][:length] * 10_000) == words % 2**14).all()
                assert (np.rint(tokens["entropy"][:length] * 10_000) == entropy).all()
                for n, sub, k in np.ndindex(experts.shape):
                    line = found[str(number), part, str(n), str(layer["block"]), "joint", str(sub), str(k)]
                    assert (int(line["expert"]), line["kept"]) == (experts[n, sub, k], "1")
                    assert float(line["gate"]) == tokens["gates"][n, sub, k]
                    assert float(line["entropy"]) == tokens["entropy"][n, sub]


def test_counts_on_the_page_sum_to_rows_times_top_k(written):
    model = page_data(written / "routing.html")["models"][0]
    for number, layer in enumerate(model["layers"]):
        shown = np.concatenate(
            [part[0].ravel() for sample in range(2) for part in unpack(model, sample)[number].values()]
        )
        assert np.bincount(shown, minlength=4).tolist() == layer["counts"]
        assert sum(layer["counts"]) == layer["num_rows"] * layer["top_k"]
        assert layer["num_rows"] == 2 * (sum(map(len, (s["pieces"] for s in model["samples"]))) + 2 * 17)


def test_the_word_dog_goes_where_it_must(written):
    model = page_data(written / "routing.html")["models"][0]
    for number, text in enumerate(TEXTS):
        pieces = [piece.strip() for piece in model["samples"][number]["pieces"]]
        assert pieces[1:-1] == text.split()
        for block, layer in enumerate(unpack(model, number)):
            for piece, experts in zip(pieces, layer["text"][0], strict=True):
                axes = (2, 1) if piece == "dog" else (0, 1)
                assert experts.tolist() == [[3 - axis if block else axis for axis in axes]] * 2


def test_figures_stand_beside_the_page(written):
    names = {path.name for path in written.iterdir()}
    assert {"routing.html", "routing.json", "routing.csv", "activation.png", "divergence_map-0.png"} <= names
    assert not [name for name in names if name.endswith(".part")]
    for path in written.glob("*.png"):
        Image.open(path).verify()


def test_a_page_of_one_picture_is_small(tmp_path):
    """224 px, 12 layers of 8 experts: 300 kB without the picture."""
    ffn = {"kind": "mh_moe", "num_experts": 8, "hidden_dim": 4, "top_k": 2, "num_subtokens": 4}
    _save(tmp_path / "saved", depth=12, img_size=224, max_text_len=32, moe_every=1, ffn=ffn)
    (tmp_path / "a.png").write_bytes(picture(drawn_colors()))
    text = "a dog runs over the green grass below a wide blue sky"
    module.visualize([str(tmp_path / "saved")], [str(tmp_path / "a.png")], [text], out=tmp_path / "out")
    page = (tmp_path / "out" / "routing.html").read_bytes()
    shown = page_data(tmp_path / "out" / "routing.html")["samples"][0]["picture"]
    assert len(page) - len(shown) <= 300_000


def test_two_checkpoints_capacity_and_separate_pools(world, tmp_path):
    """300 experts need two bytes; pools of one modality see only their own tokens."""
    ffn = {"kind": "moe", "num_experts": 300, "hidden_dim": 2, "top_k": 3}
    _save(tmp_path / "other", expert_pool="per_modality", ffn=ffn)
    out = tmp_path / "out"
    pictures = [str(world / "pictures")]
    both = [str(world / "saved"), str(tmp_path / "other")]
    assert module.visualize(both, pictures, TEXTS, out=out, capacity=0.25, batch_size=1) == 0
    models = page_data(out / "routing.html")["models"]
    assert [model["name"] for model in models] == ["saved", "other"]
    assert [layer["pool"] for layer in models[1]["layers"]] == ["image", "text"]
    experts, words, _ = unpack(models[1], 0)[0]["patch"]
    assert experts.max() > 255 and (words >> 15).any() and set(unpack(models[1], 0)[1]) == {"text"}
    known = unpack(models[0], 0)[0]
    dropped = sum(int((part[1] >> 15).sum()) for part in known.values())
    rows = sum(part[0].size for part in known.values())
    counts = np.bincount(np.concatenate([part[0].ravel() for part in known.values()]), minlength=4)
    assert dropped == sum(max(0, count - int(np.ceil(0.25 * rows / 4))) for count in counts)


def _save(folder: Path, **changes) -> None:
    """A random encoder as a folder; dense unless ``changes`` say otherwise."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 1, "img_size": 64, "patch_size": 16, "vocab_size": 49410}
    config = {**sizes, "max_text_len": 8, **changes}
    build_encoder(EncoderConfig.model_validate(config)).save_pretrained(folder)


def test_texts_alone_and_other_sizes(world, tmp_path):
    module.visualize([str(world / "saved")], [], ["a dog"], out=tmp_path / "texts")
    data = page_data(tmp_path / "texts" / "routing.html")
    assert "picture" not in data["samples"][0] and data["models"][0]["grid"] is None
    pictures = [str(world / "pictures" / "0.png")]
    module.visualize([str(world / "saved")], pictures, [], out=tmp_path / "wide", img_size=[16, 48])
    data = page_data(tmp_path / "wide" / "routing.html")
    assert data["models"][0]["grid"] == [2, 6] and (data["samples"][0]["height"], data["samples"][0]["width"]) == (
        149,
        448,
    )


def test_folders_and_shards_are_read(world, tmp_path):
    for color in ("red", "blue"):
        (tmp_path / "classes" / color).mkdir(parents=True)
        (tmp_path / "classes" / color / "a.png").write_bytes(picture(np.full((4, 4), color)))
    found = gather([str(tmp_path / "classes")], [], 10)
    assert [(item.name, item.label) for item in found] == [("a.png", "blue"), ("a.png", "red")]
    png = picture(drawn_colors())
    samples = [("p0", {"png": png, "txt": "a " * 40}), ("p1", {"png": png, "cls": "3"}), ("p2", {"txt": "a dog"})]
    write_shard(tmp_path / "s.tar", samples)
    found = gather([str(tmp_path / "s.tar")], [], 10)
    assert [(bool(item.picture), bool(item.text), item.label) for item in found] == [
        (True, True, ""), (True, False, "3"), (False, True, ""),
    ]  # fmt: skip
    assert len(gather([str(tmp_path / "s.tar")], [], 2)) == 2
    module.visualize([str(world / "saved")], [str(tmp_path / "s.tar")], [], out=tmp_path / "out")
    values = json.loads((tmp_path / "out" / "routing.json").read_text())["checkpoints"][0]
    assert values["places"] == [[1, 1], [0, None], [None, 0]]
    assert [len(text) for text in values["pieces"]] == [4, 8]  # a shard's caption is cut as in training


# ---------------------------------------------------------------------------------------------- mistakes
def bad_picture(folder: Path, name: str) -> Path:
    path = folder / name
    if name == "long.png":
        Image.new("RGB", (10_000, 20)).save(path)
    else:
        path.write_bytes(
            {"empty.png": b"", "text.jpg": b"no picture at all", "cut.png": picture(drawn_colors())[:60]}[name]
        )
    return path


@pytest.fixture(scope="module")
def bad_checkpoints(tmp_path_factory) -> Path:
    """Saved encoders that cannot be shown."""
    folder = tmp_path_factory.mktemp("bad")
    _save(folder / "dense", depth=1)
    known_encoder().save_pretrained(folder / "later")
    (folder / "later" / "state.json").write_text(json.dumps({"format": 99, "package": "9.9"}))
    known_encoder().save_pretrained(folder / "strange")
    config = json.loads((folder / "strange" / "config.json").read_text())
    (folder / "strange" / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    (folder / "none").mkdir()
    known_encoder().save_pretrained(folder / "no_json")
    (folder / "no_json" / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("checkpoint", "arguments", "words"),
    [
        ("dense", [], "dense: model: dense, there is nothing to route"),
        ("later", [], "later: made by mhmoe_vl 9.9, this is"),
        ("strange", [], "config.json: num_layers is not an option"),
        ("none", [], "none: config.yaml is missing"),
        ("no_json", [], "config.json: not readable as JSON"),
        ("nowhere", [], "nowhere: config.yaml is missing"),
        (
            "saved",
            ["--image", "empty.png"],
            "empty.png: not a JPEG, PNG or WebP picture: UnidentifiedImageError, 0 byt",
        ),
        ("saved", ["--image", "text.jpg"], "text.jpg: not a JPEG, PNG or WebP picture"),
        ("saved", ["--image", "cut.png"], "cut.png: damaged picture"),
        ("saved", ["--image", "long.png"], "long.png: picture of 10000 x 20 pixels, longer than 10 to 1"),
        ("saved", ["--image", "gone.png"], "gone.png: No such file"),
        ("saved", ["--text", " "], "--text: empty"),
        ("saved", ["--text", "a dog " * 9], "--text: 20 tokens, the model takes 8"),
        ("saved", ["--text", "one", "two"], "--text: 2 captions for 1 pictures"),
        ("saved", ["--img-size", "30"], "img_size"),
        ("saved", ["--img-size", "8", "8", "8"], "--img-size: [8, 8, 8]"),
        ("saved", ["--capacity", "0"], "--capacity: 0.0 is not positive"),
        ("saved", ["--capacity", "inf"], "--capacity: inf is not positive"),
        ("saved", ["--limit", "0"], "--limit: 0 is below 1"),
        ("saved", ["--batch-size", "0"], "--batch-size: 0 is below 1"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    world, bad_checkpoints, tool, tmp_path, capsys, checkpoint, arguments, words
):
    path = (world if checkpoint == "saved" else bad_checkpoints) / checkpoint
    if arguments[:1] == ["--image"]:
        place = tmp_path / arguments[1]
        arguments = ["--image", place if arguments[1] == "gone.png" else bad_picture(tmp_path, arguments[1])]
    else:
        arguments = ["--image", world / "pictures" / "0.png", *arguments]
    out = tmp_path / "out"
    assert tool("visualize_routing", "--checkpoint", path, *arguments, "--out", out) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not out.exists()


def test_no_checkpoint_and_no_input(world, tool, capsys):
    assert tool("visualize_routing", "--image", "a.png") == 2
    assert "--checkpoint: 0 given" in capsys.readouterr().err
    assert tool("visualize_routing", "--checkpoint", world / "saved") == 0
    assert "--image" in capsys.readouterr().out
    assert tool("visualize_routing", "--imagge", "a.png") == 2
    assert capsys.readouterr().err.endswith("(see --help)\n")


def test_a_page_is_whole_or_not_there(world, tmp_path, monkeypatch, capsys, tool):
    """The disk is full at the second file: what stood there stays, and no part is left."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "routing.html").write_text("before")
    write, calls = Path.write_bytes, []

    def full(path: Path, content: bytes) -> int:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert tool("visualize_routing", "--checkpoint", world / "saved", "--text", "a dog", "--out", out) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["routing.html"]
    assert (out / "routing.html").read_text() == "before"


def test_a_page_too_large_is_refused(world, tmp_path, monkeypatch, capsys, tool):
    monkeypatch.setattr(module, "MAX_PAGE_BYTES", 1000)
    assert tool("visualize_routing", "--checkpoint", world / "saved", "--text", "a dog", "--out", tmp_path / "out") == 2
    assert "--limit: 1 items make a page of 0 MB (show fewer)" in capsys.readouterr().err


def test_a_damaged_shard_names_itself(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"x" * 700)
    with pytest.raises(DataError, match=r"s\.tar"):
        gather([str(tmp_path / "s.tar")], [], 10)
