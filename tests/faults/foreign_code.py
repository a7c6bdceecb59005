"""Promise 4: no file, name, address or environment setting makes us run what a stranger wrote."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import torch
import yaml

from mhmoe_vl import commands, config
from mhmoe_vl.analysis.report import write_report
from mhmoe_vl.data import records
from mhmoe_vl.data.loader import StepDataset, open_shards
from mhmoe_vl.data.manifest import manifest_path
from mhmoe_vl.data.sample import BadSample
from mhmoe_vl.data.shards import ShardSet, expand_shards, stream_samples
from mhmoe_vl.data.text import create_text_tokenizer
from mhmoe_vl.data.transforms import decode_image
from mhmoe_vl.errors import MhmoeError
from mhmoe_vl.models.convert_vqkd import read_weights
from mhmoe_vl.models.factory import load_encoder_weights, load_pretrained
from mhmoe_vl.models.visual_tokenizer import load_visual_tokenizer
from mhmoe_vl.train import checkpoint, resume

from .harness import CRASHED, Found, fork, wait
from .runs import pretrain

TITLE = "no foreign code"


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


class Attack(NamedTuple):
    """A hostile file, name or setting: made and used in a folder; another folder, the canary, must not appear."""

    name: str
    run: Callable[[Path, Path], object]
    control: bool = False
    """an unsafe reader, which shows that the payload works"""


# ---------------------------------------------------------------------------------------------- shards
MEMBERS = [
    "pkl", "pickle", "pyd", "pth", "PYD", "x.pyd", "pyd.gz", "pt", "bin", "npy", "npz", "txt.gz", "json.gz", "ten",
    "mp", "msg", "safetensors", "py", "sh", "so", "jpg", "jpeg", "png", "webp", "txt", "json", "cls",
]  # fmt: skip
IMAGES = {
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%mkdir CANARY) (w) file\nshowpage\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>mkdir CANARY</script><image href="file:///etc/passwd"/></svg>',
    "mvg": b"push graphic-context\nviewbox 0 0 9 9\nfill 'url(https://x\"|mkdir CANARY\")'\npop graphic-context\n",
    "ppm": b"P6 1000000 1000000 255\n",
    "psd": b"8BPS\0\1" + bytes(200),
    "fits": b"SIMPLE  =                    T" + bytes(2850),
}
NAMES = [
    "../../CANARY", "CANARY", "a/../../x.txt", "__bad__.__bad__", "1.__key__", "1.__local_path__", ";mkdir CANARY;.txt",
    "$(mkdir CANARY).txt", "`mkdir CANARY`.txt", "|mkdir CANARY.txt", "x\x1b]0;mkdir CANARY\x07.txt", "{{7*7}}.txt",
]  # fmt: skip
LINKS = {"hard": tarfile.LNKTYPE, "symbolic": tarfile.SYMTYPE, "device": tarfile.CHRTYPE, "fifo": tarfile.FIFOTYPE}


def _add(archive: tarfile.TarFile, name: str, data: bytes, kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = (len(data) if kind == tarfile.REGTYPE else 0), kind, target
    archive.addfile(info, io.BytesIO(data))


def _read_all_ways(shard: Path) -> None:
    """Stream, index, train on, check and describe a shard."""
    bad: list[BadSample] = []
    decoded = [*stream_samples([str(shard)], bad.append)]
    with suppress(MhmoeError):
        decoded += list(ShardSet([str(shard)]))
    for sample in decoded:
        for use in (lambda s: decode_image(s.image()), lambda s: s.text(), lambda s: s.json()):
            with suppress(BadSample):
                use(sample)
    with suppress(MhmoeError):
        StepDataset({"a": (open_shards([str(shard)]), 1, lambda sample, rng: decode_image(sample.image()))}, len)
    for command in ("check-data", "make-manifest", "check-data"):
        commands.main([command, str(shard)])


def _member(name: str, data: Callable[[Path], bytes]) -> Callable[[Path, Path], None]:
    def run(folder: Path, canary: Path) -> None:
        with tarfile.open(folder / "a.tar", "w") as archive:
            _add(archive, name.replace("CANARY", str(canary)), data(canary))
            _add(archive, "1.txt", b"text")
        _read_all_ways(folder / "a.tar")

    return run


def _link(kind: bytes) -> Callable[[Path, Path], None]:
    def run(folder: Path, canary: Path) -> None:
        with tarfile.open(folder / "a.tar", "w") as archive:
            _add(archive, "0.jpg", b"", kind, f"{canary}/../../etc/passwd")
            _add(archive, "0.jpg/../../../x.txt", b"text")
        _read_all_ways(folder / "a.tar")

    return run


def _manifest(text: str) -> Callable[[Path, Path], None]:
    def run(folder: Path, canary: Path) -> None:
        with tarfile.open(folder / "a.tar", "w") as archive:
            _add(archive, "1.pkl", pickle.dumps(Canary(canary)))
        manifest_path(folder / "a.tar").write_text(text.replace("CANARY", str(canary)))
        _read_all_ways(folder / "a.tar")

    return run


def _shard_attacks() -> Iterator[Attack]:
    for extension in MEMBERS:
        yield Attack(f"pickle as .{extension} in a shard", _member(f"1.{extension}", lambda c: pickle.dumps(Canary(c))))
    for kind, data in IMAGES.items():
        content = lambda canary, data=data: data.replace(b"CANARY", str(canary).encode())  # noqa: E731
        yield Attack(f"{kind} as .jpg in a shard", _member("1.jpg", content))
    for name in NAMES:
        yield Attack(f"member {name!r}", _member(name, lambda canary: b"text"))
    for name, kind in LINKS.items():
        yield Attack(f"{name} member", _link(kind))
    pickled = '{"version":1,"size":9,"sha256":"","shard":"CANARY","samples":[{"key":"1","members":{"pkl":[512,99,0]}}]}'
    yield Attack("manifest that lists a pickle", _manifest(pickled))
    outside = (
        '{"version":1,"size":9,"shard":"../../CANARY","sha256":"","samples":[{"key":"../x","members":{"txt":[0,9,0]}}]}'
    )
    yield Attack("manifest that names another file", _manifest(outside))


# --------------------------------------------------------------------------------------------- addresses
ADDRESSES = [
    "pipe:mkdir CANARY", "pipe:mkdir CANARY; cat a.tar", "PIPE:mkdir CANARY", "file:///CANARY", "-", "|mkdir CANARY",
    "gs://x/a.tar;mkdir CANARY", "s3://x/$(mkdir CANARY)", "hf://x/y", "exec:mkdir CANARY", "ftp://127.0.0.1/a.tar",
    "$(mkdir CANARY).tar", "`mkdir CANARY`.tar", "a.tar;mkdir CANARY", "{0..999999999}.tar", "{0..9}" * 12 + ".tar",
    "a.tar::pipe:mkdir CANARY", "data:application/x-tar,x", "http+unix://x/a.tar",
]  # fmt: skip


def _address(address: str, **settings: str) -> Callable[[Path, Path], None]:
    def run(folder: Path, canary: Path) -> None:
        os.environ.update({key: value.replace("CANARY", str(canary)) for key, value in settings.items()})
        os.chdir(folder)
        spec = address.replace("CANARY", str(canary))
        with suppress(MhmoeError):
            urls = expand_shards(spec, folder)
            list(stream_samples(urls, lambda bad: None))
        commands.main(["check-data", spec])

    return run


def _address_attacks() -> Iterator[Attack]:
    for address in ADDRESSES:
        yield Attack(f"address {address!r}", _address(address))
    rewrite = {"GOPEN_REWRITE": "http://127.0.0.1:9=pipe:mkdir CANARY;", "WDS_SECURE": "0", "GOPEN_VERBOSE": "1"}
    yield Attack("GOPEN_REWRITE", _address("http://127.0.0.1:9/a.tar", **rewrite))


# ------------------------------------------------------------------------------------- weights, checkpoints
def _torch_zip(path: Path, canary: Path) -> None:
    """A file as torch.save writes it, with another pickle inside."""
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, pickle.dumps(Canary(canary), 2) if name.endswith("data.pkl") else data)


def _script(path: Path, canary: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/version", "3\n")
        archive.writestr("x/code/__torch__.py", f"import os\nos.mkdir({str(canary)!r})\n")
        archive.writestr("x/constants.pkl", pickle.dumps(Canary(canary), 2))
        archive.writestr("x/data.pkl", pickle.dumps(Canary(canary), 2))


def _pickle(protocol: int) -> Callable[[Path, Path], None]:
    return lambda path, canary: path.write_bytes(pickle.dumps({"model": Canary(canary)}, protocol)) and None


def _numpy(path: Path, canary: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([Canary(canary)], dtype=object), allow_pickle=True)


def _legacy_tar(path: Path, canary: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            _add(archive, name, pickle.dumps(Canary(canary), 2))


WEIGHTS = {f"pickle of protocol {number}": _pickle(number) for number in range(6)} | {
    "torch.save file": _torch_zip,
    "TorchScript file": _script,
    "NumPy file": _numpy,
    "old tar of torch": _legacy_tar,
}


def _weights(make: Callable[[Path, Path], None], name: str, **settings: str) -> Callable[[Path, Path], None]:
    def run(folder: Path, canary: Path) -> None:
        os.environ.update(settings)
        make(folder / name, canary)
        uses = [read_weights, load_visual_tokenizer, lambda path: load_encoder_weights(torch.nn.Module(), path)]
        for use in uses:
            with suppress(MhmoeError):
                use(folder / name)
        commands.main(["convert-checkpoint", str(folder / name)])

    return run


def _sealed(folder: Path, **changed: bytes) -> Path:
    """A run with a checkpoint in which some files are others, and all checksums right again."""
    checkpoint.save(folder / "checkpoints", {"model": {"w": torch.ones(2)}}, {"step": 1}, "seed: 0\n")
    last = folder / "checkpoints" / "last"
    for name, data in changed.items():
        (last / name.replace("__", ".")).write_bytes(data)
    sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in last.iterdir() if f.name[0] not in "Cc."}
    sums["config.yaml"] = hashlib.sha256((last / "config.yaml").read_bytes()).hexdigest()
    (last / "checksums.json").write_text(json.dumps(sums))
    (last / "COMPLETE").write_text(hashlib.sha256((last / "checksums.json").read_bytes()).hexdigest())
    (folder / "config.yaml").write_bytes((last / "config.yaml").read_bytes())
    return last


YAML = {
    "apply": "seed: !!python/object/apply:os.mkdir [CANARY]",
    "new": "seed: !!python/object/new:os.mkdir [CANARY]",
    "name": "seed: !!python/name:os.mkdir",
    "module": "seed: !!python/module:os",
    "tuple": "seed: !!python/tuple [!!python/object/apply:os.mkdir [CANARY]]",
    "key": "? !!python/object/apply:os.mkdir [CANARY]\n: 1",
    "tag": "%TAG ! tag:yaml.org,2002:python/object/apply:\n---\nseed: !os.mkdir [CANARY]",
    "alias": "a: &a !!python/object/apply:os.mkdir [CANARY]\nseed: *a",
    "template": "output_dir: \"{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}\"",
}


def _checkpoint(content: Callable[[Path], dict[str, bytes]]) -> Callable[[Path, Path], None]:
    def run(folder: Path, canary: Path) -> None:
        last = _sealed(folder, **content(canary))
        for path in (last, folder):
            uses = [
                checkpoint.read,
                load_pretrained,
                load_visual_tokenizer,
                lambda p: checkpoint.newest(p / "checkpoints", lambda text: None),
                lambda p: resume.named(p, lambda text: None),
            ]
            for use in uses:
                with suppress(MhmoeError):
                    use(path)
            commands.main(["check-checkpoint", str(path)])
            pretrain("--eval", path)

    return run


def _settings(text: str) -> Callable[[Path, Path], None]:
    def run(folder: Path, canary: Path) -> None:
        (folder / "a.yaml").write_text(text.replace("CANARY", str(canary)))
        pretrain("--config", folder / "a.yaml", "--print-config")
        value = text.replace("CANARY", str(canary)).partition("seed: ")[2] or text
        with suppress(MhmoeError):
            config.parse_overrides(["--seed", value])

    return run


def _dcp(canary: Path) -> dict[str, bytes]:
    return {"__metadata": pickle.dumps(Canary(canary)), "0_0__distcp": pickle.dumps(Canary(canary))}


def _weight_attacks() -> Iterator[Attack]:
    for name, make in WEIGHTS.items():
        yield Attack(f"weights: {name}", _weights(make, "w.pth"))
    forced = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    for name in ("pickle of protocol 2", "torch.save file", "old tar of torch", "TorchScript file"):
        yield Attack(f"weights: {name}, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", _weights(WEIGHTS[name], "w.pth", **forced))
    yield Attack("weights: pickle as .safetensors", _weights(_pickle(2), "w.safetensors", **forced))
    pickled = lambda canary: pickle.dumps(Canary(canary))  # noqa: E731
    for part in ("model__safetensors", "optimizer__safetensors", "state__json", "config__yaml", "evil__pkl"):
        content = lambda canary, part=part: {part: pickled(canary)}  # noqa: E731
        yield Attack(f"checkpoint with a pickle as {part.replace('__', '.')}", _checkpoint(content))
    yield Attack("distributed checkpoint's metadata", _checkpoint(_dcp))
    for name, text in YAML.items():
        content = lambda canary, text=text: {"config__yaml": text.replace("CANARY", str(canary)).encode()}  # noqa: E731
        yield Attack(f"checkpoint's config.yaml, {name}", _checkpoint(content))
        yield Attack(f"configuration, {name}", _settings(text))


# ----------------------------------------------------------------------------------- annotations and reports
def _annotation(suffix: str) -> Callable[[Path, Path], None]:
    def run(folder: Path, canary: Path) -> None:
        path = folder / f"a{suffix}"
        path.write_bytes(pickle.dumps(Canary(canary)))
        for use in (records.read_json, records.read_json_lines, lambda p: create_text_tokenizer("sentencepiece", p)):
            with suppress(MhmoeError):
                use(path)
        for kind in ("vqa", "captions", "nlvr2"):
            commands.main(["score", kind, "--predictions", str(path), "--annotations", str(path)])

    return run


def _report(folder: Path, canary: Path) -> None:
    text = "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}{% import 'os' as o %}".replace("CANARY", str(canary))
    (folder / "config.yaml").write_text(json.dumps({"output_dir": text, text: text}))
    line = {"step": 1, "split": "train", "time": "2026-01-01T00:00:00+00:00", "loss": 1.0, text: 2.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "split": text}) + "\n")
    (folder / "summary.json").write_text(json.dumps({text: text}))
    write_report(folder)


def _other_attacks() -> Iterator[Attack]:
    for suffix in (".json", ".json.gz", ".jsonl", ".csv", ".model"):
        yield Attack(f"pickle as annotations {suffix}", _annotation(suffix))
    yield Attack("templates in a run's names", _report)


# ------------------------------------------------------------------------------------------------- controls
def _controls() -> Iterator[Attack]:
    """Readers that do run what strangers wrote: each payload must work there, or the test above shows nothing."""

    def unsafe_torch(folder: Path, canary: Path) -> None:
        _torch_zip(folder / "w.pth", canary)
        torch.load(folder / "w.pth", weights_only=False)

    def shell(folder: Path, canary: Path) -> None:
        subprocess.run(ADDRESSES[0].removeprefix("pipe:").replace("CANARY", str(canary)), shell=True, check=True)

    yield Attack("pickle.loads", lambda f, canary: pickle.loads(pickle.dumps(Canary(canary))), control=True)
    yield Attack("torch.load", unsafe_torch, control=True)
    yield Attack("yaml", lambda f, c: yaml.unsafe_load(YAML["apply"].replace("CANARY", str(c))), control=True)
    yield Attack("shell", shell, control=True)
    text = YAML["template"].partition(": ")[2].strip('"')
    yield Attack("template", lambda f, c: jinja2.Template(text.replace("CANARY", str(c))).render(), control=True)


def check(folder: Path, full: bool) -> Found:
    found = Found("")
    attacks = [*_shard_attacks(), *_address_attacks(), *_weight_attacks(), *_other_attacks()]
    chosen = attacks if full else attacks[::4]
    ran = crashed = 0
    for number, attack in enumerate([*chosen, *_controls()]):
        place, canary = folder / f"{number:03d}", folder / f"canary-{number:03d}"
        place.mkdir()
        code = wait(fork(lambda attack=attack, p=place, c=canary: attack.run(p, c) and None, place / "said"), 60)
        ran += canary.exists() and not attack.control
        if attack.control != canary.exists():
            found.failures.append(f"{attack.name}: {'the payload does nothing' if attack.control else 'canary ran'}")
        if code is None or code == CRASHED:
            crashed += 1
            found.failures.append(f"{attack.name}: code {code}: {(place / 'said').read_text()[-400:]}")
    found.figure = f"{len(chosen)} hostile files, names, addresses and settings: {ran} canaries run, {crashed} crashes"
    found.numbers = {"attacks": len(chosen), "canaries": ran, "crashes": crashed}
    return found
