"""Texts that are not trusted, made harmless for where they are written.

A token, a label or a file's name is data: in a terminal, a table or a file's name it
must not command anything. Pages have their template's escaping, and figures draw with
`parse_math=False`.
"""

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

import numpy as np

# These join letters, and command nothing.
_JOINERS = "\u200c\u200d"
# A spreadsheet computes a cell that begins with one of these.
_FORMULAS = (
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\n",
    "\uff1d",
    "\uff0b",
    "\uff0d",
    "\uff20",
)
_REPLACED = "\ufffd"


def terminal(text: str) -> str:
    r"""A text without characters that a terminal obeys; lines and tabs stay.

    >>> terminal("\x1b[31mred")
    '�[31mred'
    """

    def obeyed(character: str) -> bool:
        kind = unicodedata.category(character)
        return kind in ("Cc", "Cf", "Cs") and character not in "\n\t" + _JOINERS

    return "".join(_REPLACED if obeyed(c) else c for c in text)


def unicode(text: str) -> str:
    r"""A text that can be UTF-8: halves of surrogate pairs are replaced.

    Parquet and files refuse them.

    >>> unicode("a\ud800b")
    'a�b'
    """
    return "".join(_REPLACED if "\ud800" <= c <= "\udfff" else c for c in text)


def csv_cell(text: str) -> str:
    """A text that a spreadsheet shows and does not compute.

    One that would be a formula begins with an apostrophe. Quotes and commas are left to
    the writer, `csv.writer`.

    >>> csv_cell("=HYPERLINK(A1)"), csv_cell("five")
    ("'=HYPERLINK(A1)", 'five')
    """
    text = unicode(text)
    formula = text.startswith(_FORMULAS) or text.lstrip().startswith(_FORMULAS)
    return f"'{text}" if formula else text


def json_line(value: Mapping[str, Any]) -> str:
    """One line of JSON that any reader takes: NaN and infinities become null.

    Characters beyond ASCII are escaped, so no line or page can be broken by them, and
    halves of surrogate pairs are replaced.

    Raises:
      TypeError: If a value is neither JSON's nor numpy's.

    >>> json_line({"score": float("nan"), "tokens": np.arange(2)})
    '{"score": null, "tokens": [0, 1]}'
    """
    return json.dumps(_plain(value), allow_nan=False)


def file_name(id: str) -> str:
    """A name for a file that belongs to an id: its sha256, whatever the id holds.

    >>> file_name("../../etc/passwd")[:12]
    '3754d6cb3a38'
    """
    return hashlib.sha256(id.encode(errors="surrogatepass")).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return unicode(value)
    if isinstance(value, Mapping):
        return {unicode(str(name)): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
