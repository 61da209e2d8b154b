"""Rows of a data set on the Hugging Face hub, or from its local cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grun.errors import DataError


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
        line = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"cannot read {shown}" if is_folder else f"cannot fetch {shown} from the hub"
        raise DataError(f"{what} ({line}); give {instead}") from error
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
