"""Pack Flickr8k (or any captions.txt of lines "image,caption" with a folder of pictures) into image-text shards.

Each picture is one sample: the picture as it is, txt with its first caption, json with "captions" (all of them) and
"image" (the file's name).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from packing import Captioned, add_picture_options, make_parser, pack_captioned, read_text, run

from mhmoe_vl.errors import DataError


def read_captions(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Captions by picture, in the order of the file, and one line for each bad row.

    Raises:
        DataError: the file cannot be read or does not start with the line ``image,caption``.
    """
    rows = csv.reader(read_text(path).splitlines())
    captions: dict[str, list[str]] = {}
    problems = []
    try:
        header = [field.strip() for field in next(rows, [])]
        if header != ["image", "caption"]:
            raise DataError(f"{path}:1: the first line is {','.join(header)!r} (it must be 'image,caption')")
        for row in filter(None, rows):
            if len(row) != 2 or not row[0].strip() or not row[1].strip():
                what = f"{len(row)} fields" if len(row) != 2 else f"empty {'caption' if row[0].strip() else 'image'}"
                problems.append(f"{path}:{rows.line_num}: {what} (write image,caption; quote commas)")
            else:
                captions.setdefault(row[0].strip(), []).append(row[1].strip())
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: {error} (mend the line)") from error
    return captions, problems


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; raises DataError on bad input."""
    parser = make_parser(__doc__, val_fraction=0.1)
    parser.add_argument("--captions", type=Path, required=True, help="captions.txt: CSV with the header image,caption")
    add_picture_options(parser, "folder of the pictures")
    args = parser.parse_args(argv)
    captions, problems = read_captions(args.captions)
    items = [Captioned(name, tuple(texts), {}) for name, texts in captions.items()]
    pack_captioned(args, items, problems, {"source": "flickr8k"})


if __name__ == "__main__":
    run(main)
