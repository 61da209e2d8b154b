"""Texts as they are compared, in any script: what is written in two ways is one, and words are told apart."""

from __future__ import annotations

import unicodedata

import regex

_SCRIPTS = (
    "Han Hiragana Katakana Bopomofo Yi Thai Lao Khmer Myanmar Tai_Le New_Tai_Lue Tai_Tham Tai_Viet Ahom Javanese "
    "Balinese Tangut Nushu Khitan_Small_Script Egyptian_Hieroglyphs Cuneiform"
).split()
UNSPACED = "".join(rf"\p{{Script={name}}}" for name in _SCRIPTS) + "\N{KATAKANA-HIRAGANA PROLONGED SOUND MARK}"
"""Inside of a character class of `regex`: scripts that put no spaces between words."""
NAME = regex.compile(r"(?<=\s)[^\W\d_a-z]\w+")
"""A word with a capital letter behind the first one of a question."""

_LEFT_OUT = regex.compile(
    # What only shapes a text, Arabic and Hebrew vowel signs, and the stroke that lengthens an Arabic word.
    r"(?V1)[\p{Default_Ignorable_Code_Point}--\u200b]|[[\u0591-\u05C7\u0610-\u061A\u064B-\u065F\u0670\u06D6-\u06ED]&&\p{M}]|\u0640|(?<=i)\u0307"
)
_ALIKE = {
    ord(letter): one
    for letters, one in (
        # Typographic marks and those of keyboards: quotes, dashes, dots within names, blanks of scripts.
        ("\u2018\u2019\u201a\u201b\u2032\u02b9\u02bb\u02bc\u02bd\u05f3", "'"),
        ("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\u05f4", '"'),
        ("\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212\u05be", "-"),
        ("\u2022\u2027\u2219\u22c5\u30fb", "\u00b7"),
        ("\u301c", "~"),
        ("\u200b\u0f0b\u0f0c\u1361", " "),
        ("\u060c\u066c", ","),
        ("\u066b", "."),
        # Letters that writers, or keyboards of neighboring languages, put for each other.
        ("\u0622\u0623\u0625\u0671", "\u0627"),
        ("\u06cc\u0649", "\u064a"),
        ("\u06a9", "\u0643"),
        ("\u0451", "\u0435"),
        ("\u0219", "\u015f"),
        ("\u021b", "\u0163"),
        ("\u0131", "i"),
    )
    for letter in letters
} | dict(zip(map(ord, "άέήίόύώ"), "αεηιουω", strict=True))  # left out in capitals
"""What is written in more than one way without another meaning: alef and yeh forms, Russian yo, dotless i, ..."""
_DIGIT = regex.compile(r"[\p{Nd}--[0-9]]", regex.V1)
_WORD = regex.compile(
    rf"(?=[[{UNSPACED}]&&[\p{{L}}\p{{N}}]])\X\p{{M}}*|[[\p{{L}}\p{{N}}]--[{UNSPACED}]][[\p{{L}}\p{{N}}\p{{M}}]--[{UNSPACED}]]*",
    regex.V1,
)
_AROUND_UNSPACED = regex.compile(rf"(?<=[{UNSPACED}])\s+|\s+(?=[{UNSPACED}])", regex.V1)


def normalized(text: str) -> str:
    """Text as it is compared, letter case kept; ASCII stays as it is.

    NFKC (composed letters, full-width forms as ordinary ones), digits of all scripts as 0 to 9, quotes, dashes and
    letters that are put for each other as one of them, without invisible characters, Arabic and Hebrew vowel signs and
    tatweel, which writers use or leave out at will. Accents stay.
    """
    if text.isascii():
        return text
    text = _LEFT_OUT.sub("", unicodedata.normalize("NFKC", text)).translate(_ALIKE)
    return _DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)


def plain(text: str) -> str:
    """Normalized text, letter case and white space apart; none stands next to a script that has no spaces."""
    return _AROUND_UNSPACED.sub("", " ".join(normalized(normalized(text).casefold()).split()))


def split_words(text: str) -> list[str]:
    """Words of letters, marks and digits of a text as it is compared, in lower case.

    A character of a script without spaces, with the marks on it, is a word of its own. Of a text without a letter or
    digit, such as punctuation or emoji, nothing is left.
    """
    found: list[str] = _WORD.findall(normalized(normalized(text).casefold()))
    return found
