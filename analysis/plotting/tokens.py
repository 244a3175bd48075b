"""Make tokens printable: no tokenizer marks, escapes for line breaks, no glyphs that the font lacks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from matplotlib.font_manager import FontProperties, findfont, get_font

LONGEST = 12  # characters of a label
BLANK = "\N{OPEN BOX}"  # label of a token of spaces only


def labels(tokens: Sequence[str]) -> list[str]:
    """Return a label for each token of a text.

    Args:
        tokens: of SentencePiece (``▁``, ``<0x0A>``), or of byte-level BPE if its marks occur anywhere in the text.
    """
    if any(mark in token for token in tokens for mark in "ĠĊĉ"):
        tokens = [_from_bytes(token) for token in tokens]
    return [_label(token) for token in tokens]


def _label(token: str) -> str:
    token = token.replace("▁", " ")
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    if byte and int(byte[1], 16) < 128:
        token = chr(int(byte[1], 16))
    label = token.strip(" ") or BLANK * bool(token)
    label = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in label)
    if len(label) > LONGEST:
        label = label[: LONGEST - 1] + "…"
    return "".join(c if ord(c) in _glyphs() else "?" for c in label)


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


@cache
def _bytes() -> dict[str, int]:
    """Return the alphabet of byte-level BPE: printable bytes are themselves, the others are letters from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(rest)}


def _from_bytes(token: str) -> str:
    alphabet = _bytes()
    if not all(letter in alphabet for letter in token):  # a special token, which is in no alphabet
        return token
    return bytes(alphabet[letter] for letter in token).decode("utf-8", errors="replace")
