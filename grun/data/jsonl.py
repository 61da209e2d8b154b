"""Rows from a JSON-lines file: one object a line, {question, answer} or {prompt, completion}, and further fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grun.data.rows import Row
from grun.errors import DataError
from grun.reading import decode, parse_json


def read_rows(path: Path) -> list[Row]:
    """Read every row of a UTF-8 JSON-lines file; blank lines are skipped, the last newline may be missing.

    Raises:
        DataError: the file is missing or empty, or a line is malformed (named by its number, counted from 1).
    """
    rows = []
    for where, record in read_records(path):
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with question and answer, one a line")
        rows.append(Row.from_record(record, where))
    return rows


def read_records(path: Path) -> list[tuple[str, Any]]:
    """The value of each line that is not blank, after the words that name the line in errors.

    Raises:
        DataError: the file is missing, empty or not UTF-8, or a line is not JSON.
    """
    records = []
    for where, line in read_lines(path):
        if not line.strip():
            continue
        records.append((where, parse_json(line.removesuffix("\n"), where)))
    if not records:
        raise DataError(f"{path} holds no rows; expected one JSON object a line")
    return records


def read_lines(path: Path) -> list[tuple[str, str]]:
    r"""Lines of a UTF-8 file, each with its newline (\n, also where the file has \r\n), after the words that name it.

    Raises:
        DataError: the file is missing or cannot be read, or a line is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"no data file {path}; check data.path and the file's name") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    *ended, rest = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n")
    lines = []
    for number, line in enumerate([*(line + b"\n" for line in ended), *([rest] if rest else [])], start=1):
        where = f"{path} line {number}"
        lines.append((where, decode(line, where)))
    return lines
