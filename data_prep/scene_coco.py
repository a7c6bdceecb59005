"""Scenes in COCO's files: captions."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
from scene_captions import caption
from scene_drawing import Scene, sample_scene
from scene_files import Files

NUM_CAPTIONS = 5


class Captioned(NamedTuple):
    """A scene with its English captions."""

    scene: Scene
    captions: tuple[str, ...]


def make_captioned(rng: np.random.Generator, image_size: int) -> Captioned:
    """A scene with captions by lot; the same caption may come twice."""
    scene = sample_scene(rng, image_size)
    return Captioned(scene, tuple(caption(scene, "en", rng) for _ in range(NUM_CAPTIONS)))


def captions_files(splits: dict[str, list[Captioned]]) -> Files:
    """Pictures and captions as COCO 2014 names them."""
    files: Files = {}
    for number, (split, items) in enumerate(splits.items()):
        subset = f"{split}2014"
        numbered = {2 * i + 1 + number: item for i, item in enumerate(items)}
        names = {image_id: f"COCO_{subset}_{image_id:012d}.jpg" for image_id in numbered}
        files |= {f"{subset}/{names[image_id]}": item.scene for image_id, item in numbered.items()}
        texts = [(image_id, text) for image_id, item in numbered.items() for text in item.captions]
        annotations = [
            {"image_id": image_id, "id": i, "caption": text} for i, (image_id, text) in enumerate(texts, start=1)
        ]
        images = [_image(image_id, names[image_id], item.scene) for image_id, item in numbered.items()]
        files[f"annotations/captions_{subset}.json"] = json.dumps(
            {**head("Drawn scenes with captions"), "images": images, "annotations": annotations}
        )
    return files


def head(description: str) -> dict[str, Any]:
    """What stands before the images."""
    info = {
        "description": description,
        "url": "",
        "version": "1.0",
        "year": 2026,
        "contributor": "data_prep/scenes.py",
        "date_created": "2026/01/01",
    }
    return {"info": info, "licenses": [{"url": "", "id": 1, "name": "MIT License"}]}


def _image(image_id: int, file_name: str, scene: Scene) -> dict[str, Any]:
    return {
        "license": 1,
        "file_name": file_name,
        "coco_url": "",
        "height": scene.image_size,
        "width": scene.image_size,
        "date_captured": "2026-01-01 00:00:00",
        "flickr_url": "",
        "id": image_id,
    }
