"""Files of ten rows in every official format, the pictures they name, and predictions for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

PLACES = range(10)
QUESTIONS = {
    "data_subtype": "val2014",
    "questions": [{"question_id": 10 + i, "image_id": 1 + i // 2, "question": f"What is number {i}?"} for i in PLACES],
}
ANNOTATIONS = {
    "annotations": [
        {
            "question_id": 10 + i,
            "image_id": 1 + i // 2,
            "question_type": "what is" if i % 2 else "is it",
            "answer_type": "other",
            "multiple_choice_answer": "red",
            "answers": [{"answer": "red", "answer_id": n} for n in range(1, 10)] + [{"answer": "blue"}],
        }
        for i in PLACES
    ]
}
NLVR2 = [
    {"identifier": f"dev-7-{pair}-{sentence}", "sentence": "One of them is red.", "label": str(pair < 3)}
    for sentence in range(2)
    for pair in range(5)
]
NLVR = [{"identifier": f"{i}-0", "sentence": "There is a blue box.", "label": str(i < 5).lower()} for i in PLACES]
COCO = {
    "images": [{"id": 1 + i, "file_name": f"COCO_val2014_{1 + i:012d}.jpg"} for i in PLACES],
    "annotations": [{"id": i, "image_id": 1 + i // 2, "caption": f"A dog runs, number {i}."} for i in range(20)],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "cocoid": 1 + i,
            "imgid": i,
            "filepath": "val2014",
            "filename": f"COCO_val2014_{1 + i:012d}.jpg",
            "split": "restval" if i < 4 else "train" if i < 6 else "val" if i < 8 else "test",
            "sentences": [{"raw": f"A cat sleeps, number {n}.", "tokens": ["a", "cat"]} for n in range(2)],
        }
        for i in PLACES
    ],
}
FLICKR8K = "image,caption\n" + "".join(f'{i // 2}.jpg,"A man , number {i} ."\n' for i in PLACES)
ANSWERS = [{"question_id": 10 + i, "answer": "red" if i < 5 else "green"} for i in PLACES]
CAPTIONS = [{"image_id": 1 + i, "caption": "a dog runs"} for i in PLACES]
TRUTHS = "".join(f"{line['identifier']},True\n" for line in NLVR2)


def lines(values: list[Any]) -> str:
    """JSON lines."""
    return "".join(json.dumps(value) + "\n" for value in values)


FILES: dict[str, Any] = {
    "vqa-questions": QUESTIONS,
    "vqa-annotations": ANNOTATIONS,
    "nlvr2": NLVR2,
    "nlvr": NLVR,
    "coco-captions": COCO,
    "karpathy": KARPATHY,
    "flickr8k": FLICKR8K,
}


def text(value: Any) -> str:
    """The text of a file: lists are JSON lines, texts are themselves, all else is JSON."""
    return value if isinstance(value, str) else lines(value) if isinstance(value, list) else json.dumps(value)


def write_pictures(folder: Path) -> Path:
    """All pictures that the files name, as small as can be."""
    folder.mkdir(exist_ok=True)
    names = [f"COCO_val2014_{1 + i:012d}.jpg" for i in PLACES] + [f"{i}.jpg" for i in range(5)]
    names += [f"dev-7-{pair}-img{side}.png" for pair in range(5) for side in (0, 1)]
    names += [f"dev-{i}-0-0.png" for i in PLACES]
    for number, name in enumerate(names):
        Image.new("RGB", (4, 4), (5 * number, 90, 200)).save(folder / name)
    return folder
