"""Rows from a JSON-lines file: one object a line, {question, answer} or {prompt, completion}, and further fields."""

from __future__ import annotations

import json
from pathlib import Path

from grun.data.rows import Row
from grun.errors import DataError


def read_rows(path: Path) -> list[Row]:
    """Read every row of a UTF-8 JSON-lines file; blank lines are skipped, the last newline may be missing.

    Raises:
        DataError: the file is missing or empty, or a line is malformed (named by its number, counted from 1).
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"no data file {path}; check data.path and the file's name") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    rows = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path} line {number}"
        try:
            text = line.decode("utf-8")
            if not text.strip():
                continue
            record = json.loads(text)
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not valid JSON ({error.msg} at column {error.colno}); expected one JSON object a line"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with question and answer, one a line")
        rows.append(Row.from_record(record, where))
    if not rows:
        raise DataError(f"{path} holds no rows; expected one JSON object a line")
    return rows
