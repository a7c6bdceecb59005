"""tools/expert_activation.py: the same numbers for any batches and processes, and a report that shows text as text."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_world import settings, write_world
from train.toy_task import in_ranks

from mhmoe_vl import config, distributed
from mhmoe_vl.analysis.activation import Activation
from mhmoe_vl.analysis.expert_activation import expert_activation
from mhmoe_vl.analysis.survey import survey
from mhmoe_vl.analysis.trace import trace_routing
from mhmoe_vl.analysis.trained import different, kept_steps, load_model
from mhmoe_vl.data.loader import open_shards
from mhmoe_vl.data.sample import BadSample
from mhmoe_vl.data.shards import expand_shards
from mhmoe_vl.data.transforms import ImageTransform
from mhmoe_vl.data.writing import write_shard
from mhmoe_vl.errors import CheckpointError, ConfigError, DataError
from mhmoe_vl.models.factory import build_encoder

ROOT = Path(__file__).parents[2]
DENSE = {"kind": "dense", "hidden_dim": 16}
SMOE = {"kind": "moe", "num_experts": 4, "hidden_dim": 16, "top_k": 1}
PAYLOADS = [
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "'\"><b>",
    "\"onmouseover=\"alert(1)", "<!--", "-->", "]]>", "<svg/onload=alert(1)>", "javascript:alert(1)", "{{7*7}}",
    "{%raw%}", "${7*7}", "&lt;b&gt;", "&amp;", "&#x3c;b>", "<style>*{display:none}</style>", "</td></table>",
    "<iframe/src=//x>", "<a/href=//x>", "\u202egnp.exe", "\u200f\u200e", "\U0001f600\U0001f468\u200d\U0001f469",
    "\u2028\u2029",
    "<base/href=//x>", "<meta/http-equiv=refresh>", "<form><input>", "`alert(1)`", "\\u003cscript\\u003e",
    "%3Cscript%3E",
    "<math><mi>", "<details/open/ontoggle=alert(1)>", "<x/style=behavior:url(x)>", "\u0130\u0131", "\u0000b",
    "\x1b[31m", "a\u0301",
    "$x_{1}$", "<ScRiPt>", "<textarea>",
]  # fmt: skip


def write_run(folder: Path, world: Path, seed: int = 0, steps=(), **encoder) -> Path:
    """A run folder with an untrained encoder, two layers of experts, and kept steps."""
    values = settings(world, folder, encoder={"depth": 4} | encoder)
    if "ffn" in encoder:
        values["encoder"]["ffn"] = encoder["ffn"]
    run = config.validate(config.run_config("masked_modeling"), values)
    for number, name in enumerate(["last", *(f"step-{step:08d}" for step in steps)]):
        torch.manual_seed(seed + number)
        weights = {f"encoder.{key}": value for key, value in build_encoder(run.encoder).state_dict().items()}
        (folder / "checkpoints" / name).mkdir(parents=True)
        save_file(weights, folder / "checkpoints" / name / "model.safetensors")
    (folder / "config.yaml").write_text(config.dump(run))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "mh_moe", world, steps=(10, 5))


@pytest.fixture(scope="module")
def mixed(world) -> list[str]:
    """Pictures, texts and pairs, seven each."""
    return [str(world / name / "val") for name in ("images", "texts", "pairs")]


def source(*places) -> object:
    return open_shards(expand_shards([str(place) for place in places]))


VARIANTS = {
    "mh_moe": {},
    "smoe": {"ffn": SMOE},
    "xmoe, fine-grained, shared expert": {
        "ffn": SMOE | {"top_k": 2, "router": {"kind": "cosine"}, "num_shared_experts": 1}
    },
    "three pools": {"multiway": "shared_attention", "expert_pool": "per_modality", "vl_ffn_layers": 2},
    "convolution": {"ffn": SMOE | {"kind": "mh_moe", "num_subtokens": 2, "conv_kernel": 3, "conv_stride": 2}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_batches_change_no_number(world, mixed, tmp_path, name):
    model = load_model(write_run(tmp_path / "run", world, **VARIANTS[name]))
    found = [survey(model, source(*mixed), words=["red"], batch_size=size).to_dict() for size in (1, 3, 8)]
    assert found[0] == found[1] == found[2]
    assert found[0]["samples"] == {"images": 14, "texts": 14, "pairs": 7}
    tokens = [pool["tokens"] for pool in found[0]["pools"].values()]
    if name == "three pools":
        names = [f"blocks.{block}.{pool}" for block in (1, 3) for pool in ("image", "text", "pair")]
        assert list(found[0]["pools"]) == [n for n in names if n != "blocks.1.pair"]
    elif name != "convolution":
        assert all(each["class"] == 14 and each["patch"] == 14 * 16 for each in tokens)


def test_processes_change_no_number(run, mixed, tmp_path):
    """Byte for byte, on every rank, with samples that do not divide evenly."""
    model = load_model(run)
    alone = survey(model, source(*mixed), words=["half"], batch_size=4)

    def share() -> int:
        torch.set_num_threads(1)
        distributed.init_process_group(torch.device("cpu"))
        found = survey(model, source(*mixed), words=["half"], batch_size=4)
        (tmp_path / f"{distributed.rank()}.json").write_text(json.dumps(found.to_dict()))
        distributed.shutdown()
        return 0

    assert in_ranks(share, 2) == [0, 0]
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.json").read_text() == json.dumps(alone.to_dict())


def test_the_survey_counts_what_traces_show(run, world):
    """Sample by sample through trace_routing, pictures and first captions read here."""
    model, pairs = load_model(run), source(world / "pairs" / "val")
    found = survey(model, pairs)
    encoder = model.encoder.double()
    traces = []
    for sample in (pairs[number] for number in range(len(pairs))):
        picture = ImageTransform(encoder.img_size, train=False)(sample.image(), None)
        text = torch.tensor([model.tokenizer.encode(sample.json()["captions"][0], encoder.max_text_len)])
        traces.append(trace_routing(encoder, picture[None].double() / 127.5 - 1, text))
    slow = Activation.of_traces(traces)
    for pool in found.used:
        assert np.array_equal(found.choices(pool), slow.choices(pool))
        assert np.array_equal(found.together(pool), slow.together(pool))
        assert found.entropy(pool) == slow.entropy(pool)
    assert np.array_equal(found.divergence("word", "special"), slow.divergence("word"))
    assert found.specialisation("word") and found.specialisation("colour") and not found.specialisation("class")


def test_capacity_is_that_of_each_sample_alone(run, world):
    model, pairs = load_model(run), source(world / "pairs" / "val")
    found = [survey(model, pairs, capacity_factor=0.5, batch_size=size) for size in (1, 5)]
    assert found[0].to_dict() == found[1].to_dict()
    dropped = sum(found[0].sums[f"dropped/{pool}"].sum() for pool in found[0].used)
    assert dropped > 0
    kept_all = survey(model, pairs)
    for pool in kept_all.used:
        assert kept_all.dropped(pool) == 0 and np.array_equal(kept_all.choices(pool), found[0].choices(pool))


def test_models_with_one_branch_read_what_they_can(world, mixed, tmp_path):
    images = load_model(write_run(tmp_path / "images", world, modalities=["image"]))
    found = survey(images, source(world / "pairs" / "val"))
    assert found.sums["samples"].tolist() == [7, 0, 0]
    texts = load_model(write_run(tmp_path / "texts", world, modalities=["text"]))
    found = survey(texts, source(world / "pairs" / "val"), words=["half"])
    assert found.sums["samples"].tolist() == [0, 7, 0] and found.listed_words()[0][1] > 0
    with pytest.raises(BadSample, match="no image, which is what the model reads"):
        survey(images, source(*mixed))


def test_classes_come_from_json_or_cls(run, world, tmp_path):
    picture = source(world / "images" / "val")[0].members["png"]
    write_shard(
        tmp_path / "a.tar",
        [
            ("0", {"png": picture, "cls": b"3", "json": b'{"class": "tench"}'}),
            ("1", {"png": picture, "cls": b"3"}),
            ("2", {"png": picture}),
        ],
    )
    found = survey(load_model(run), source(tmp_path / "a.tar"))
    assert set(found.tokens["patch"].columns["class"]) == {"tench", "3", ""}
    assert found.specialisation("class")["blocks.1.joint"].num_labels == 2


# -------------------------------------------------------------------------------------------- report
class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_a_report_of_several_models(run, world, mixed, tmp_path, capsys, tool):
    dense, smoe = write_run(tmp_path / "dense", world, ffn=DENSE), write_run(tmp_path / "smoe", world, ffn=SMOE)
    words = tmp_path / "words.txt"
    words.write_text("Half\nzebra\n")
    common = ["--data", *mixed, "--words", words, "--out", tmp_path / "out", "--num-workers", 0, "--device", "cpu"]
    assert tool("expert_activation", "--checkpoint", dense, smoe, run, *common) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    figures = [
        "activated_share", "activation", "coactivation-3", "divergence", "modality_share", "specialisation",
        "transitions-2", "transitions-3",
    ]  # fmt: skip
    assert names == sorted(["activation.json", "report.html", *(f"{name}.png" for name in figures)])
    assert [Path(line).name for line in capsys.readouterr().out.split()][-1] == "report.html"
    for name in figures:
        Image.open(tmp_path / "out" / f"{name}.png").verify()
    found = json.loads((tmp_path / "out" / "activation.json").read_text())
    assert found["num_samples"] == 21 and found["models"]["dense"] == {"routed": False}
    for name, top_k, subtokens in (("smoe", 1, 1), ("mh_moe", 2, 4)):
        for pool in found["models"][name]["pools"].values():
            assert sum(pool["share_per_token"]) == pytest.approx(top_k * subtokens)
            assert sum(pool["share_per_row"]) == pytest.approx(top_k)
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "Dense, there is nothing to route: dense." in page.text and "Listed words that do not occur: 1." in page.text
    assert sum(tag == "img" and a["src"].startswith("data:image/png;base64,") for tag, a in page.tags) == len(figures)
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_only_dense_models(world, mixed, tmp_path):
    dense = write_run(tmp_path / "dense", world, ffn=DENSE)
    assert expert_activation([str(dense)], mixed, out=tmp_path / "out", num_workers=0, device="cpu") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["activation.json", "report.html"]
    assert "nothing to route: dense" in Page((tmp_path / "out" / "report.html").read_text()).text


@pytest.mark.slow
def test_text_is_shown_and_runs_nothing(world, tmp_path):
    """Forty payloads as words, listed words and classes, and some as names of runs, lists and shards."""
    name = "<img src=x onerror=alert(1)>&amp;\u202e"
    run = write_run(tmp_path / name, world)
    picture = source(world / "images" / "val")[0].members["png"]
    samples = [
        (f"{i:03d}", {"png": picture, "txt": payload.encode(), "json": json.dumps({"class": payload}).encode()})
        for i, payload in enumerate(PAYLOADS)
        if payload.strip()
    ]
    shard = tmp_path / "<b>'\".tar"
    write_shard(shard, samples)
    words = tmp_path / "<script>alert(1).txt"
    lines = [payload.split()[0] for payload in PAYLOADS if payload.split() and "\x00" not in payload]
    words.write_text("\n".join(lines), encoding="utf-8")
    options = {"words": words, "num_workers": 0, "device": "cpu", "batch_size": 20}
    assert expert_activation([str(run)], [str(shard)], out=tmp_path / "out", **options) == 0
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    allowed = {"html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "p", "section", "figure"}
    allowed |= {"figcaption", "img", "div", "details", "summary", "table", "thead", "tbody", "tr", "th", "td"}
    assert {tag for tag, _ in page.tags} <= allowed
    attributes = {attribute for _, found in page.tags for attribute in found}
    assert attributes <= {"lang", "charset", "http-equiv", "content", "name", "class", "src", "alt", "scope"}
    assert text.count("<style>") == 1 and "\u202e" not in text and "\x00" not in text and "\x1b" not in text
    assert "<img src=x onerror=alert(1)>&amp;\\u202e" in page.text and "<script>alert(1).txt" in page.text
    assert "<script>alert(1)</script" in page.text.replace(" ", "")
    found = json.loads((tmp_path / "out" / "activation.json").read_text())
    assert len(found["models"]) == 1 and len(found["models"][next(iter(found["models"]))]["listed_words"]) > 30


def test_maps_of_a_picture_by_kept_steps(run, tmp_path, tool):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(file, "png")
    (tmp_path / "photo.png").write_bytes(file.getvalue())
    arguments = ["--checkpoint", run, "--image", tmp_path / "photo.png", "--out", tmp_path / "out", "--device", "cpu"]
    assert tool("expert_activation", *arguments) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["activation.json", "divergence_maps.png", "report.html"]
    maps = json.loads((tmp_path / "out" / "activation.json").read_text())["divergence_by_step"]["mh_moe"]
    assert list(maps) == ["step 5", "step 10"] and np.shape(maps["step 5"]) == (4, 4)
    assert maps["step 5"] != maps["step 10"]


def test_kept_steps_in_order(run):
    assert [(step, path.name) for step, path in kept_steps(run)] == [(5, "step-00000005"), (10, "step-00000010")]
    with pytest.raises(CheckpointError, match="keep_steps"):
        kept_steps(run / "checkpoints" / "last")


def test_names_of_models(run):
    assert load_model(run / "checkpoints" / "last").name == "mh_moe/last"
    assert different(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


# ----------------------------------------------------------------------------------------- bad input
def test_mistakes_are_one_line(run, world, mixed, tmp_path, capsys, tool):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("river bank\n")
    (tmp_path / "photo.png").write_bytes(b"")
    write_shard(tmp_path / "bad.tar", [("0", {"png": b"no picture"})])
    write_shard(tmp_path / "none.tar", [("0", {"cls": b"1"})])
    data, checkpoint = ["--data", *mixed], ["--checkpoint", run]
    cases = {
        "--checkpoint: none given": data,
        "--data: none given": checkpoint,
        "no such shard or folder": [*checkpoint, "--data", tmp_path / "nothing"],
        "no *.tar in this folder": [*checkpoint, "--data", tmp_path / "empty"],
        "is not positive": [*checkpoint, *data, "--capacity", "-1"],
        "--batch-size 0": [*checkpoint, *data, "--batch-size", "0"],
        "words.txt:1: 'river bank'": [*checkpoint, *data, "--words", tmp_path / "words.txt"],
        "bad.tar:0:": [*checkpoint, "--data", tmp_path / "bad.tar"],
        "no image or text": [*checkpoint, "--data", tmp_path / "none.tar"],
        "photo.png": [*checkpoint, "--image", tmp_path / "photo.png"],
        "config.yaml is missing": ["--checkpoint", tmp_path / "empty", *data],
        "invalid choice": [*checkpoint, *data, "--per", "expert"],
        "unrecognized arguments: --wrods": [*checkpoint, *data, "--wrods", "x"],
    }
    for message, arguments in cases.items():
        assert tool("expert_activation", *arguments, "--out", tmp_path / "out", "--num-workers", 0) == 2, message
        [line] = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("error: ") and message in line, (message, line)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(run, mixed, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match="--out"):
        expert_activation([str(run)], mixed, out=tmp_path / "out", num_workers=0, device="cpu")
    assert (tmp_path / "out").read_text() == "a file"


def test_data_without_samples(run, tmp_path):
    write_shard(tmp_path / "a.tar", [])
    with pytest.raises((DataError, ConfigError), match="no samples"):
        expert_activation([str(run)], [str(tmp_path / "a.tar")], out=tmp_path / "out", device="cpu")
