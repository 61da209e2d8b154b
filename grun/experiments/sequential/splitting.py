"""From a forget set to requests: whose rows are whose, and which of them are asked for together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grun.data.rows import Row, common_rows
from grun.errors import ConfigError, DataError
from grun.method.stack.forget_rows import check_forget_rows

NAMED = ("person", "author", "country")
"""Fields of a row that say whose it is, or what it is about."""
TOFU_ROWS = 20
"""Rows of each of TOFU's authors, who do not stand in the rows; they come one after another."""


@dataclass(frozen=True)
class Request:
    """One request to forget."""

    id: str
    rows: tuple[int, ...]
    """Places of its rows in the forget set, from 0."""

    def subjects(self, forget: Sequence[Row]) -> list[str]:
        """Whom or what its rows name, each once."""
        return list(dict.fromkeys(name for place in self.rows if (name := named(forget[place]))))


def named(row: Row) -> str | None:
    """Whose row it is, or what it is about, if it says so."""
    return next((str(row.extra[field]) for field in NAMED if row.extra.get(field)), None)


def people(rows: Sequence[Row], corpus: str) -> list[list[int]]:
    """Places of each person's rows, people in the order in which they first appear.

    A row that names nobody stands for itself, but TOFU's, which are 20 an author.

    Args:
        rows: the forget set.
        corpus: its name, such as demo or tofu.
    """
    found: dict[object, list[int]] = {}
    for place, row in enumerate(rows):
        name = named(row)
        alone = ("tofu", place // TOFU_ROWS) if corpus == "tofu" else ("row", place)
        found.setdefault(alone if name is None else name, []).append(place)
    return list(found.values())


def cut(rows: Sequence[Row], corpus: str, count: int) -> list[Request]:
    """Cut a forget set into `count` consecutive requests of as many people each, as far as that goes.

    Raises:
        ConfigError: there are fewer people than requests.
    """
    everybody = people(rows, corpus)
    if not 1 <= count <= len(everybody):
        raise ConfigError(
            f"requests={count}, but the forget set has {len(everybody)} people; give a number from 1 to "
            f"{len(everybody)}, or a larger forget set"
        )
    bounds = [number * len(everybody) // count for number in range(count + 1)]
    width = len(str(count))
    return [
        Request(f"r{number:0{width}}", tuple(place for person in everybody[start:end] for place in person))
        for number, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False), start=1)
    ]


def joined(own: Mapping[str, Sequence[Row]]) -> tuple[list[Request], list[Row]]:
    """Requests of own rows, by id, and all their rows one after another."""
    requests: list[Request] = []
    rows: list[Row] = []
    for name, of_request in own.items():
        requests.append(Request(name, tuple(range(len(rows), len(rows) + len(of_request)))))
        rows += of_request
    return requests, rows


def check_requests(requests: Sequence[Request], forget: Sequence[Row], retain: Sequence[Row], *, overlap: bool) -> None:
    """DataError for a request that shares rows or questions with the retain set, or rows with an earlier request.

    Args:
        requests: in their order.
        forget: the forget set.
        retain: what is to stay.
        overlap: accept what also stands in the retain set.
    """
    earlier: list[Row] = []
    for request in requests:
        rows = [forget[place] for place in request.rows]
        try:
            check_forget_rows(rows, [] if overlap else retain)
        except DataError as error:
            raise DataError(f"request {request.id}: {error}") from error
        if twice := common_rows(rows, earlier):
            raise DataError(f"request {request.id}: {len(twice)} of its rows also stand in an earlier request")
        earlier += rows
