"""Records of files that are tables: CSV, TSV, Parquet."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grun.errors import DataError
from grun.runtime.reading import decode, first_line, parse_json

PARQUET = b"PAR1"
"""What a Parquet file begins with."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LONGEST_CELL = 2**31 - 1
_JSON_CELLS = ("messages", "conversations", "earlier", "perturbed_answer", "choices", "history")
"""Fields that are no texts: a cell of theirs holds JSON."""


def read_csv(path: Path, content: bytes, delimiter: str) -> list[tuple[str, dict[str, Any]]]:
    """A record for each row below the header, without its empty cells, after the words that name it.

    DataError for text that is no such table, and for a row with other cells than the header.
    """
    csv.field_size_limit(_LONGEST_CELL)
    records: list[tuple[str, dict[str, Any]]] = []
    try:
        text = io.StringIO(decode(content, str(path)), newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader, [])]
        if len(header) == 1 and any(other in header[0] for other in (";", "\t", ",")):
            raise DataError(f"{path}: the first line names one column; separate columns by {delimiter!r}")
        if not all(header) or len({*header}) < len(header):
            raise DataError(f"{path}: every column needs a name of its own in the first line")
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if row and len(row) != len(header):
                raise DataError(
                    f"{where}: {len(row)} cells, and the first line names {len(header)} columns; put a cell that holds "
                    f"{delimiter!r} or a line break in double quotes"
                )
            if row:
                cells = zip(header, row, strict=True)
                records.append((where, {name: _cell(name, text, where) for name, text in cells if text}))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: no CSV ({error})") from error
    return records


def _cell(name: str, text: str, where: str) -> Any:
    if name not in _JSON_CELLS:
        return text
    return parse_json(text, f"{where}, column {name!r}")


def read_parquet(path: Path, content: bytes) -> list[tuple[str, dict[str, Any]]]:
    """A record for each row, after the words that name it; DataError for what is no Parquet."""
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is no whole Parquet file ({first_line(error)})") from error
    return [(f"{path} row {number}", plain_record(row)) for number, row in enumerate(rows, start=1)]


def plain_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that JSON has a type for; dates, pictures and the like are left out."""
    return {name: value for name, value in record.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | dict):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
