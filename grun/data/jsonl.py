"""Rows from a file: JSON lines or a JSON list, CSV, TSV, Parquet, each perhaps compressed by gzip; or from the hub."""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grun.data.rows import FIELDS, SHAPES, Row, shape_of
from grun.errors import ConfigError, DataError, unknown_name
from grun.runtime.reading import decode, fields_in, first_line, kind_of, parse_json

PARQUET = b"PAR1"
"""What a Parquet file begins with."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LONGEST_CELL = 2**31 - 1
_JSON_CELLS = ("messages", "conversations", "earlier", "perturbed_answer", "choices", "history")
"""Fields that are no texts: a cell of theirs holds JSON."""
ENDINGS = tuple(f"{ending}{gz}" for gz in ("", ".gz") for ending in (".jsonl", ".json", *DELIMITERS, ".parquet"))
"""Ends of names of files that hold records."""
_GZIP = b"\x1f\x8b"
_HUB = re.compile(r"(hub:)?(?P<repository>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+)(?=:))?(:(?P<split>[\w.-]+))?")


def load_rows(name: str, folder: str | None = None, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Rows of a file, or of a data set of the hub.

    Args:
        name: a file; or OWNER/NAME[[:CONFIG]:SPLIT] of the hub, where no such file is there; or FOLDER:SPLIT, a data
            set on disk in any form that `datasets.load_dataset` takes.
        folder: where it lies; None: the current folder.
        columns: our name of a field -> its name in the file.

    Raises:
        ConfigError: `columns` names a field that no row has.
        DataError: it is not there, or is malformed.
    """
    return rows_of(load_records(name, folder), columns)


def load_prompts(name: str, folder: str | None = None, columns: Mapping[str, str] | None = None) -> list[Row]:
    """As `load_rows`, of rows of which only what is asked counts: records may hold a question (or prompt) alone.

    A file that ends in .txt holds a prompt a line. Rows without an answer have an empty completion.
    """
    path = Path(folder or "").expanduser() / Path(name).expanduser()
    if name.lower().removesuffix(".gz").endswith(".txt"):
        rows = [Row(line.strip(), "") for _, line in read_lines(path) if line.strip()]
        if not rows:
            raise DataError(f"{path} holds no prompts; expected one a line")
        return rows
    records = [*load_records(name, folder)]
    named = [(where, _renamed(record, columns or {})) for where, record in records if isinstance(record, dict)]
    if len(named) < len(records) or all(shape_of(record) is not None for _, record in named):
        return rows_of(records, columns)
    return [Row.from_record(one, at) if shape_of(one) is not None else _prompt_of(one, at) for at, one in named]


def _prompt_of(record: Mapping[str, Any], where: str) -> Row:
    field = next((field for field in ("prompt", "question") if field in record), None)
    if field is None:
        raise DataError(
            f"{where}: a prompt needs the field prompt or question; it has: {fields_in(record)}. data.columns names "
            "others"
        )
    prompt = record[field]
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: field {field!r} must be a text that is not empty; it is {kind_of(prompt)}")
    return Row(prompt, "", {name: value for name, value in record.items() if name != field})


def load_records(name: str, folder: str | None = None) -> Iterable[tuple[str, Any]]:
    """Records of a file, or of a data set of the hub, after the words that name each; see `load_rows`."""
    path = Path(folder or "").expanduser() / Path(name).expanduser()
    stem, colon, split = str(path).rpartition(":")
    is_folder, hub = bool(colon) and Path(stem).is_dir(), _HUB.fullmatch(name)
    if path.exists() or name.lower().endswith(ENDINGS) or not (hub or is_folder):
        return read_records(path)
    source = (stem, None, split) if is_folder or hub is None else hub.group("repository", "config", "split")
    instead = f"a file ending in {ENDINGS[0]}, or another of those in docs/formats.md"
    records = hub_rows(*source, called=name, instead=instead)
    return ((where, plain_record(record)) for where, record in records)


def read_rows(path: Path, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Read every row of a file; see `read_records` and `Row.from_record`.

    Raises:
        ConfigError: `columns` names a field that no row has.
        DataError: the file is missing or empty, or a row is malformed (named by its line or number, counted from 1).
    """
    return rows_of(read_records(path), columns)


def rows_of(records: Iterable[tuple[str, Any]], columns: Mapping[str, str] | None = None) -> list[Row]:
    """Rows of records, all of one shape; `columns` says what our fields are called in them."""
    columns = columns or {}
    for name in columns:
        if name not in FIELDS:
            raise ConfigError(unknown_name("data.columns: field", name, list(FIELDS)))
    if len({*columns.values()}) < len(columns):
        raise ConfigError("data.columns names one column for two fields; each field has a column of its own")
    rows: list[Row] = []
    first: Any = None
    for where, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object with question and answer, one a line")
        named = _renamed(record, columns)
        rows.append(Row.from_record(named, where))
        shape = shape_of(named) or ()
        first = first or shape
        if shape != first and not {shape, first} <= {*SHAPES[:2]}:
            raise DataError(
                f"{where}: a row of {' and '.join(shape)}, and the first one is of {' and '.join(first)}; put rows of "
                "one kind into a file"
            )
    return rows


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    there = {column: name for name, column in columns.items() if column in record}
    kept = {key: value for key, value in record.items() if key not in there and key not in there.values()}
    return kept | {name: record[column] for column, name in there.items()}


def read_records(path: Path) -> list[tuple[str, Any]]:
    """The values of a file, after the words that name the line or row of each in errors.

    Parquet, CSV (.csv) and TSV (.tsv) give an object a row; anything else is a JSON list, or JSON lines, of which blank
    ones are skipped.

    Raises:
        DataError: the file is missing, empty, or not what its name or its beginning says.
    """
    content = read_bytes(path)
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    if ending == ".parquet" or content.startswith(PARQUET):
        records: list[tuple[str, Any]] = list(read_parquet(path, content))
    elif ending in DELIMITERS:
        records = list(read_csv(path, content, DELIMITERS[ending]))
    else:
        records = _read_json(path, content)
    if not records:
        raise DataError(f"{path} holds no rows; expected one JSON object a line")
    return records


def _read_json(path: Path, content: bytes) -> list[tuple[str, Any]]:
    """Values of JSON lines, or of a list: a file that begins with [ is one, unless its first line is JSON by itself."""
    lines = read_lines(path, content)
    said = [(where, line) for where, line in lines if line.strip()]
    if said and said[0][1].lstrip().startswith("["):
        try:
            values = parse_json("".join(line for _, line in lines), str(path))
            return [(f"{path} row {number}", value) for number, value in enumerate(values, start=1)]
        except DataError as error:
            try:
                parse_json(said[0][1], "")
            except DataError:
                raise error from None
    if said and said[0][1].strip() == "{":
        raise DataError(f"{path} holds objects of several lines; expected a list of rows, or one object a line")
    return [(where, parse_json(line.removesuffix("\n"), where)) for where, line in said]


def read_lines(path: Path, content: bytes | None = None) -> list[tuple[str, str]]:
    r"""Lines of a UTF-8 file, each with its newline (\n, also where the file has \r\n), after the words that name it.

    Raises:
        DataError: the file is missing or cannot be read, or a line is not UTF-8.
    """
    content = read_bytes(path) if content is None else content
    *ended, rest = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n")
    lines = []
    for number, line in enumerate([*(line + b"\n" for line in ended), *([rest] if rest else [])], start=1):
        where = f"{path} line {number}"
        lines.append((where, decode(line, where)))
    return lines


def read_bytes(path: Path) -> bytes:
    """Content of a file, decompressed if it is gzip; DataError if it cannot be had."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"no data file {path}; check data.path and the file's name") from error
    except OSError as error:
        hint = f"; of a data set in a folder name the split, {path.name}:train" if path.is_dir() else ""
        raise DataError(f"cannot read {path}: {error.strerror or error}{hint}") from error
    if not content.startswith(_GZIP):
        if path.suffix.lower() == ".gz" and content:
            raise DataError(f"{path} is not compressed by gzip, as its name says; compress it, or rename it")
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is no whole gzip file ({first_line(error)}); compress it again") from error


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
                cells = {name: text for name, text in zip(header, row, strict=True) if text}
                parsed = {
                    name: parse_json(cells[name], f"{where}, column {name!r}") for name in _JSON_CELLS if name in cells
                }
                records.append((where, cells | parsed))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: no CSV ({error})") from error
    return records


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


def hub_rows(
    repository: str, config: str | None, split: str | None, *, called: str, instead: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of one split, in order, after the words that name each in errors.

    Args:
        repository: owner/name of the data set, or a folder, of which no copy is left in the cache.
        config: its configuration; None: the only one, or the default.
        split: train, test, ...; None: the only one.
        called: what those words call the rows.
        instead: what the user can give in place of the hub, such as "data.path, a folder that holds people.jsonl".

    Raises:
        DataError: the data set is gated and access is missing, the hub cannot be reached, there are no rows, or there
            are several splits to choose from.
    """
    import datasets

    shown = " ".join(filter(None, (repository, config, split)))
    is_folder = Path(repository).is_dir()
    how = {"streaming": True} if is_folder else {}
    try:
        found: Any = datasets.load_dataset(repository, config, split=split, **how)
        if split is None and len(found) > 1:
            first = next(iter(found))
            raise DataError(f"{repository} has the splits {', '.join(found)}; name one: {repository}:{first}")
        table = next(iter(found.values())) if split is None else found
        table = list(table) if is_folder else table
    except DataError:
        raise
    except Exception as error:  # `datasets` raises many kinds for one cause
        if _is_gated(error):
            raise DataError(
                f"{repository} is gated: ask for access at https://huggingface.co/datasets/{repository}, then run "
                f"`hf auth login` or set HF_TOKEN; or give {instead}"
            ) from error
        what = f"cannot read {shown}" if is_folder else f"cannot fetch {shown} from the hub"
        raise DataError(f"{what} ({first_line(error)}); give {instead}") from error
    if not len(table):
        raise DataError(f"{shown}{'' if is_folder else ' on the hub'} holds no rows; give {instead}")
    return ((f"{called} row {number}", row) for number, row in enumerate(table, start=1))


def _is_gated(error: BaseException | None) -> bool:
    """Whether the hub refused access, which `datasets` puts in words or names as a cause."""
    from huggingface_hub.errors import GatedRepoError

    while error is not None:
        if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
