"""What metrics see of a text in any script: its words, or its characters where a script has no spaces.

A text in ASCII is seen as `rouge_score` sees it, stems included, so published numbers hold. Beyond ASCII that package
sees nothing: it takes letters from a to z and digits alone.
"""

from __future__ import annotations

import functools
import unicodedata
from typing import TYPE_CHECKING

import regex

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

_SCRIPTS = (
    "Han Hiragana Katakana Bopomofo Yi Thai Lao Khmer Myanmar Tai_Le New_Tai_Lue Tai_Tham Tai_Viet Ahom Javanese "
    "Balinese Tangut Nushu Khitan_Small_Script Egyptian_Hieroglyphs Cuneiform"
).split()
UNSPACED = "".join(rf"\p{{Script={name}}}" for name in _SCRIPTS) + "\N{KATAKANA-HIRAGANA PROLONGED SOUND MARK}"
"""Inside of a character class of `regex`: scripts that put no spaces between words."""

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
_REPEATED = regex.compile(rf"(\S{{0,11}}?[[{UNSPACED}]&&\p{{L}}]\S{{0,11}}?)\1{{3,}}", regex.V1)


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


def words(text: str) -> list[str]:
    """Words of letters, marks and digits, in lower case; English ones of more than 3 letters stemmed (Porter).

    A character of a script without spaces, with the marks on it, is a word of its own. Of a text without a letter or
    digit, such as punctuation or emoji, nothing is left.
    """
    found = _WORD.findall(normalized(normalized(text).casefold()))
    return [stem for word in found for stem in (_stems(word) if word.isascii() else [word])]


def repeats(text: str) -> bool:
    """Whether up to 23 characters with one of a script without spaces among them stand more than 3 times running."""
    return not text.isascii() and _REPEATED.search(normalized(text)) is not None


@functools.lru_cache(maxsize=2**16)
def _stems(word: str) -> list[str]:
    return _published().tokenize(word)


@functools.cache
def _published() -> DefaultTokenizer:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)


def rouge_recall(reference: str, text: str) -> float | None:
    """Share of the reference's words that stand in `text` in the same order (longest common subsequence).

    None where the reference has no word, so that nothing can be said of any answer.
    Source: Lin 2004, as computed by `rouge_score` with its Porter stemmer.
    """
    if not words(reference):
        return None
    return float(_scorer().score(reference, text)["rougeL"].recall)


@functools.cache
def _scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return words(text)

    return RougeScorer(["rougeL"], tokenizer=Words())
