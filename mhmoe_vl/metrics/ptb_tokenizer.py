"""Tokens of captions as coco-caption scores them: those of Stanford's PTBTokenizer 3.4.1, without Java.

At every position the rule that reads furthest makes the token, the earlier one of two that read as far. Tokens are
then lower-cased, and coco-caption's list of punctuation is left out. British spellings stay as they are. Not told
apart, for their rarity in captions: telephone numbers, file names, faces, scripts without spaces.
"""

from __future__ import annotations

import re

READ_AS = str.maketrans(
    {
        **dict.fromkeys("’‘‚‛´`‹›", "'"),
        **dict.fromkeys("“”„‟«»", '"'),
        **dict.fromkeys("‐‑‒", "-"),
        **dict.fromkeys("–—―", "--"),
        "…": "...",
    }
)
"""Typographic marks that are read as plain ones."""

BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
"""coco-caption keeps them: its list has them in capitals, and they are lower case by then."""

ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">"}

PUNCTUATION = re.compile(r"-{1,4}|\.{3,}|['\"]{1,2}|[.,:;?!]")
"""Whole tokens that are left out; runs such as ``?!`` are not among them, nor other signs."""

ABBREVIATIONS = r"""
    jan feb mar apr jun jul aug sept? oct nov dec mon tues? wed thu thurs fri
    ala ariz (?-i:A)z (?-i:A)rk calif colo conn ct dak (?-i:D)el fla ga (?-i:I)ll ind kans? ky (?-i:La) (?-i:M)ass
    md mich minn (?-i:M)iss mo mont neb nev okla (?-i:O)re (?-i:P)a penn tenn (?-i:T)ex va vt (?-i:W)ash wisc? wyo
    inc cos? corp pp?t[ye]s? ltd plc rt bancorp dept bhd assn univ intl sys tel est ext sq
    jr sr bros (?:ed|ph)\.d blvd rd esq etc ect al seq bldg
    mr mrs ms drs? profs? sens? reps? attys? lt col gen messrs govs? adm rev maj sgt cpl pvt capt ste? ave pres lieut
    hon brig co?mdr pfc spc supts? det mt ft adj adv asst assoc ens insp mlle mme msgr sfc
    invt elec natl m[ft]g vs? wm jos cie cf
"""
"""Words that keep the period after them, also at the end of a sentence."""

NUMBER_ABBREVIATIONS = "ca figs? props? nos? arts? bldg pp op"
"""Words that keep it before a number only."""

SENTENCE_STARTS = """
    A About According Additionally After All Also Although An Another As At Before Both But By Did During Each Earlier
    Following For From He Her Here His How However If In It Its Last Later Many More Most Now On Once One Other Our She
    Since So Some Such That The Their Then There These They This Two Under Upon We When While What Who Why Yet You
"""
"""Before these a single letter with a period ends a sentence ("plan B. The"), and is no initial ("B. Jones")."""


def _any(table: str) -> str:
    return "|".join(table.split())


LETTER, INSIDE = r"[^\W\d_]", r"(?:[^\W_]|[\u0300-\u036f])*"
WORD = rf"{LETTER}{INSIDE}(?:[.!?]{LETTER}{INSIDE})*"
CLITIC = "'(?:m|s|d|re|ve|ll|em)"
NUMBER = r"(?:\d*(?:[.,]\d+)+|\d+(?:[.:,]\d+)*)"
PIECE = rf"(?:[dol]'[a-z0-9])?(?:[a-z0-9]+|{NUMBER})"
SLASHED = "[a-z0-9]+(?:-[a-z]+){0,2}"
NOT_SPACE = re.compile(r"\S")
URL_END = r"[^\s<>|.!?,;:&()\[\]{}'\"-]"

RULES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # Words, and what is split off them.
        rf"(can)not|(?:(gon|wan)na|(got)ta|(lem|gim)me|('t)(?:is|was))(?!{LETTER})",
        rf"({WORD}){CLITIC}",
        "([a-z]*[a-mo-z])n't",
        rf"(y'){WORD}",
        rf"({WORD})",
        rf"({CLITIC}|n't)(?!{LETTER}|')",
        # Words with an apostrophe of their own.
        "('(?:n'?|[2-9]0s|till?|cause)|(?:[ldj]|dunkin|somethin|ol)')",
        "(c'mon|e'er|s'mores|ev'ry|li'l|nat'l|cont'd)",
        rf"((?-i:[A-HJ-XZn])'{LETTER}{{2,}}|{LETTER}+[aeiouy]'(?-i:[aeiouA-Z]){LETTER}*)",
        # Addresses, names and tags of the web.
        rf"((?:https?|ftp)://[^\s<>|()\[\]{{}}]+{URL_END})",
        rf"((?:www\.(?:[^\s<>|.!?,]+\.)+[a-z]{{2,4}}|(?:[\w-]+\.)+(?:com|net|org|edu))(?:/[^\s<>|]+{URL_END})?)",
        r"([\w.%+-]+@(?:[\w-]+\.)*[\w-]+)",
        rf"(@[a-z_]\w*|\#{LETTER}\w*[^\W_])",
        r"(</?[a-z][\w:-]*\s*/?>|&(?:amp|lt|gt);)",
        # Numbers, and words joined by hyphens, slashes or ampersands.
        rf"([-+]?{NUMBER})",
        r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4}|(?:\d{1,4}[- \u00a0])?\d{1,4}/\d{1,4})",
        rf"({PIECE}(?:-{PIECE})*)",
        r"([a-z0-9][a-z0-9.,]*(?:-(?:[a-z0-9]+|(?:[a-z]\.)+))+)[^a-z0-9.+]",
        rf"({SLASHED}(?:/{SLASHED}){{1,2}})",
        r"(?-i:([A-Z]+(?:[+&][A-Z]+)+|[A-Z]*\$))",
        # Words that keep their period.
        rf"((?:{_any(ABBREVIATIONS)})\.)(?!{LETTER})",
        rf"((?:{_any(NUMBER_ABBREVIATIONS)})\.)\s?\d",
        rf"([a-z])\.\s+(?-i:{_any(SENTENCE_STARTS)})\s",
        r"((?:[a-z]\.)+)",
        rf"({WORD}\.)[,;:]",
        # Marks; other characters, such as emoji, are passed over.
        r"(''|-+|\.{3,}|[?!]+|\*+|=+|@+|\#+|_+)",
        r"([!-/:-@\[-`{-~\u00a1-\u00bf×÷\u2020-\u20bf\u2100-\u2bff\u3001-\u303f])",
    )
)
"""The last group that matched is the token; what the pattern reads behind it tells how far it reads, no more."""


def tokenize(text: str) -> str:
    """The tokens of a caption, apart by single spaces: ``It can't (really).`` -> ``it ca n't -lrb- really -rrb-``."""
    text, position, tokens = text.translate(READ_AS), 0, []
    while start := NOT_SPACE.search(text, position):
        position = start.start()
        found = [match for rule in RULES if (match := rule.match(text, position))]
        if not found:
            position += 1
            continue
        best = max(found, key=re.Match.end)
        token = best[best.lastindex].lower()
        position = best.end(best.lastindex)
        if not PUNCTUATION.fullmatch(token):
            tokens.append(BRACKETS.get(token) or ENTITIES.get(token, token))
    return " ".join(tokens)
