"""Pack texts into text shards: plain text (one paragraph per line) and JSON in SQuAD's format (its contexts).

A file whose name ends in .json is read as JSON, any other as plain text. Blank lines and headings (" = Title = ", as
in WikiText) are dropped, the rest stays as it is. Each sample is one txt: a paragraph, or a part of it when it is long.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from packing import make_parser, pack, positive_number, read_json, read_text, run, split, whole_number

from mhmoe_vl.errors import DataError

# Chinese and Japanese write no blanks: there a character counts as a word, and keeps the punctuation after it.
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"\s*(?:[{_IDEOGRAPH}][。，、！？；：」』）》”]*|[^\s{_IDEOGRAPH}]+)")
SENTENCE_END = re.compile(r"[.!?。！？।؟][\"'”’»」』)）]*$")


def read_paragraphs(path: Path) -> list[str]:
    """The paragraphs of a file, without blank lines and headings.

    Raises:
        DataError: the file cannot be read or is not in the format that its name promises.
    """
    is_json = path.suffix.lower() == ".json"
    lines = map(str.strip, contexts(path, read_json(path)) if is_json else read_text(path).split("\n"))
    return [line for line in lines if line and not (line.startswith("= ") and line.endswith(" ="))]


def contexts(path: Path, data: Any) -> list[str]:
    """``data[*].paragraphs[*].context`` of a file in SQuAD's format, each once."""
    found: dict[str, None] = {}
    for i, article in enumerate(entries(data, "data", str(path))):
        for j, paragraph in enumerate(entries(article, "paragraphs", f"{path}:data[{i}]")):
            context = paragraph.get("context") if isinstance(paragraph, dict) else None
            if not isinstance(context, str):
                raise DataError(f"{path}:data[{i}].paragraphs[{j}].context: no text (name a file in SQuAD's format)")
            found[" ".join(context.split("\n"))] = None
    return list(found)


def entries(parent: Any, key: str, place: str) -> list[Any]:
    """The list ``parent[key]``."""
    value = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(value, list):
        raise DataError(f"{place}: no list {key!r} (name a file in SQuAD's format)")
    return value


def parts(paragraph: str, max_words: int) -> Iterator[str]:
    """Cut a paragraph into parts of at most ``max_words`` words.

    A cut is made after the last sentence that ends in the second half of what fits, else between two words.
    """
    words = WORD.findall(paragraph)
    while len(words) > max_words:
        ends = [i for i in range(max_words // 2, max_words + 1) if i and SENTENCE_END.search(words[i - 1])]
        cut = ends[-1] if ends else max_words
        yield "".join(words[:cut]).strip()
        words = words[cut:]
    yield "".join(words).strip()


def text_members(text: str) -> dict[str, str]:
    """A sample of a text."""
    return {"txt": text}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; raises DataError on bad input."""
    parser = make_parser(__doc__, val_fraction=0.0)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="files: .json like SQuAD, else plain text")
    parser.add_argument("--min-chars", type=whole_number, default=20, help="drop shorter texts (and shorter parts)")
    parser.add_argument("--max-words", type=positive_number, default=40, help="cut longer paragraphs")
    args = parser.parse_args(argv)
    paragraphs = [paragraph for path in args.texts for paragraph in read_paragraphs(path)]
    splits = {
        name: [part for text in texts for part in parts(text, args.max_words) if len(part) >= args.min_chars]
        for name, texts in split(paragraphs, args.val_fraction, args.seed).items()
    }
    keys = ("seed", "val_fraction", "min_chars", "max_words")
    settings = {"source": "text", **{key: getattr(args, key) for key in keys}}
    sizes = {"samples_per_shard": args.samples_per_shard, "processes": args.processes}
    pack(args.out, splits, text_members, settings, **sizes)


if __name__ == "__main__":
    run(main)
