"""``routing.html``: where sub-tokens go, on one page that opens from disk, without a server or network.

The page is ``routing.html`` with ``routing.css`` and the script ``routing_*.js`` set in, and the traces as JSON. Text
reaches the document through ``textContent`` only; the content security policy names the hashes of the one script and
the one style sheet and allows nothing else. Choices are packed per sample as little-endian arrays in base64:

for each pool of experts, for each of ``class``, ``patch`` and ``text`` that passed it (bits 1, 2, 4 of ``passes``):

* experts, N S K numbers of 1 byte (2 where there are more than 256 experts),
* gates, N S K numbers of 2 bytes: bits 0 to 13 the gate in units of 0.0001; bit 14 set where the row is counted at
  another token; bit 15 set where capacity dropped the choice,
* entropies, N S numbers of 4 bytes, in units of 0.0001 nats.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from .report import template
from .samples import Item
from .trace import DIGITS, PARTS, LayerTrace, RoutingTrace, TokenTrace

COPY, DROPPED = 1 << 14, 1 << 15
UNITS = 10**DIGITS
SCRIPTS = ("data", "draw", "panels", "sheets", "actions")
"""Parts of the script, in this order."""
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Shown:
    """A checkpoint's trace of the items of a page.

    Attributes:
        name: of the checkpoint.
        trace: of all items.
        places: per item, its place among the trace's images and among its texts; none where it has none.
    """

    name: str
    trace: RoutingTrace
    places: Sequence[tuple[int | None, int | None]]


def render(items: Sequence[Item], pictures: Sequence[Tensor | None], shown: Sequence[Shown]) -> str:
    """The page.

    Args:
        items: what was traced.
        pictures: per item uint8 (3, H, W) to show, or none.
        shown: one or two checkpoints.
    """
    data = {
        "units": UNITS,
        "samples": [_sample(item, picture) for item, picture in zip(items, pictures, strict=True)],
        "models": [_model(one, len(items)) for one in shown],
    }
    style = (_FOLDER / "routing.css").read_text(encoding="utf-8")
    parts = [(_FOLDER / f"routing_{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    script = '"use strict";\n(() => {\n' + "\n".join(parts) + "})();\n"
    return template("routing.html").render(
        title=" and ".join(one.name for one in shown),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=_embedded(data),
    )


def _embedded(data: Any) -> str:
    """JSON that no HTML parser takes for markup: ASCII only, so U+2028 and U+2029 are escaped too."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(content: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"


# ---------------------------------------------------------------------------------------------- data
def _sample(item: Item, picture: Tensor | None) -> dict[str, Any]:
    values: dict[str, Any] = {"name": item.name, "label": item.label, "text": item.text or ""}
    if picture is not None:
        values |= {"picture": _data_address(picture), "height": picture.shape[1], "width": picture.shape[2]}
    return values


def _data_address(picture: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _model(shown: Shown, num_items: int) -> dict[str, Any]:
    trace = shown.trace
    samples = [_choices(trace, *shown.places[number]) for number in range(num_items)]
    pieces = [[] if text is None else list(trace.pieces[text]) for _, text in shown.places]
    return {
        "name": shown.name,
        "grid": trace.grid,
        "capacity": trace.capacity_factor,
        "layers": [_layer(layer) for layer in trace.layers],
        "samples": [
            {"passes": passes, "choices": choices, "pieces": words}
            for (passes, choices), words in zip(samples, pieces, strict=True)
        ],
    }


def _layer(layer: LayerTrace) -> dict[str, Any]:
    names = ("block", "pool", "num_experts", "top_k", "num_subtokens", "num_rows")
    return {name: getattr(layer, name) for name in names} | {"counts": layer.counts().tolist()}


def _choices(trace: RoutingTrace, image: int | None, text: int | None) -> tuple[list[int], str]:
    """Which kinds of tokens of a sample passed each pool (bits), and all its choices, packed."""
    passes, packed = [], []
    for layer in trace.layers:
        bits = 0
        for bit, name in enumerate(PARTS):
            sample = text if name == "text" else image
            if sample is not None and name in layer.parts and layer.parts[name].present[sample].any():
                bits |= 1 << bit
                length = len(trace.pieces[text]) if name == "text" else None
                packed.append(_packed(layer.parts[name], sample, length, layer.num_experts))
        passes.append(bits)
    return passes, base64.b64encode(b"".join(packed)).decode()


def _packed(tokens: TokenTrace, sample: int, length: int | None, num_experts: int) -> bytes:
    experts, gates, kept = (v[sample, :length] for v in (tokens.experts, tokens.gates, tokens.kept))
    copies = ~tokens.counted[sample, :length, None, None]
    words = _units(gates) | np.where(kept, 0, DROPPED) | np.where(copies, COPY, 0)
    width = "<u1" if num_experts <= 256 else "<u2"
    entropy = _units(tokens.entropy[sample, :length])
    return experts.astype(width).tobytes() + words.astype("<u2").tobytes() + entropy.astype("<u4").tobytes()


def _units(values: np.ndarray) -> np.ndarray:
    return np.rint(values.astype(np.float64) * UNITS).astype(np.int64)
