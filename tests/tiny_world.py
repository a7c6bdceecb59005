"""A pre-training run that takes seconds: two-coloured pictures, sentences about them, a small visual tokenizer."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from safetensors.torch import save_file

from mhmoe_vl import config
from mhmoe_vl.data.writing import write_shard
from mhmoe_vl.models.visual_tokenizer import VisualTokenizer

COLORS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 80, 220), "yellow": (240, 220, 60)}
TOKENIZER = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "num_codes": 16,
    "code_dim": 8,
    "target_dim": 192,
}
COUNTS = {"train": 24, "val": 7}


def sample(rng: np.random.Generator) -> tuple[bytes, str]:
    """A PNG of two halves and the sentence that says so."""
    left, right = rng.choice(list(COLORS), size=2)
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16], pixels[:, 16:] = COLORS[left], COLORS[right]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue(), f"a {left} half beside a {right} half"


def write_world(folder: Path) -> Path:
    """Shards of the three streams and a visual tokenizer's run folder below ``folder``."""
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        made = [sample(rng) for _ in range(count)]
        members = {
            "images": lambda png, text: {"png": png},
            "texts": lambda png, text: {"txt": text},
            "pairs": lambda png, text: {"png": png, "txt": text, "json": {"captions": [text, text.upper()]}},
        }
        for stream, choose in members.items():
            (folder / stream / split).mkdir(parents=True)
            write_shard(folder / stream / split / "a.tar", [(f"{i:03d}", choose(*m)) for i, m in enumerate(made)])
    write_visual_tokenizer(folder / "visual_tokenizer", TOKENIZER)
    return folder


def write_visual_tokenizer(run: Path, sizes: dict[str, int]) -> None:
    """A run folder with an untrained visual tokenizer; its codes still tell colours apart."""
    import torch

    torch.manual_seed(0)
    more = {"ema_decay": 0.9, "commitment_weight": 1.0, "revive_after": 0}
    tokenizer = VisualTokenizer(**sizes, **more)
    (run / "checkpoints" / "last").mkdir(parents=True)
    weights = {f"tokenizer.{name}": value for name, value in tokenizer.state_dict().items()}
    save_file(weights, run / "checkpoints" / "last" / "model.safetensors")
    task = {"kind": "visual_tokenizer", "model": sizes | more, "images": {"train": "a.tar"}}
    settings = config.validate(config.RunConfig, {"task": task})
    (run / "config.yaml").write_text(config.dump(settings))


def settings(world: Path, out: Path, **changes) -> dict:
    """A configuration of ``tools/pretrain.py`` on the tiny world; ``changes`` are merged over it."""
    values = {
        "output_dir": str(out),
        "encoder": {
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "img_size": 32,
            "patch_size": 8,
            "vocab_size": 49410,
            "max_text_len": 16,
            "ffn": {"kind": "mh_moe", "num_experts": 4, "hidden_dim": 16, "top_k": 2, "num_subtokens": 4},
        },
        "task": {
            "kind": "masked_modeling",
            "visual_tokenizer": str(world / "visual_tokenizer"),
            "data_dir": str(world),
            "images": {"train": "images/train", "val": "images/val", "batch_size": 4},
            "texts": {"train": "texts/train", "val": "texts/val", "batch_size": 4},
            "pairs": {"train": "pairs/train", "val": "pairs/val", "batch_size": 4},
            "augment": {"min_crop": 0.8, "flip": 0.0, "color_jitter": 0.0},
            "text_mask_ratio": 0.3,
        },
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "train": {
            "steps": 6,
            "log_every": 1,
            "eval_every": 3,
            "num_workers": 0,
            "threads": 1,
            "precision": "float32",
            "device": "cpu",
        },
    }
    return config.merge(values, changes)


def write_settings(path: Path, values: dict) -> Path:
    """``values`` as a YAML file; copied as JSON first, since PyYAML writes a section that stands twice as an alias."""
    path.write_text("# a test's configuration\n" + yaml.safe_dump(json.loads(json.dumps(values))))
    return path
