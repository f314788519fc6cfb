"""Texts that are not trusted, made harmless for where they are written.

A token, a label or a record's name is data: on a terminal it must not command anything.
Parquet and JSON hold any text as it is, figures draw with `parse_math=False`, and no
text of the data names a file.
"""

import unicodedata

# These join letters, and command nothing.
_JOINERS = "\u200c\u200d"
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
