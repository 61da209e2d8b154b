"""Rows of a data set on the Hugging Face hub, or from its local cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grun.errors import DataError


def hub_rows(repository: str, config: str | None, split: str, *, instead: str) -> Sequence[Mapping[str, Any]]:
    """Rows of one split, in order.

    Args:
        repository: owner/name of the data set.
        config: its configuration; None: the only one, or the default.
        split: train, test, ...
        instead: what the user can give in place of the hub, such as "data.path, a folder that holds people.jsonl".

    Raises:
        DataError: the data set is gated and access is missing, the hub cannot be reached, or there are no rows.
    """
    import datasets

    shown = " ".join(filter(None, (repository, config, split)))
    try:
        table: Sequence[Mapping[str, Any]] = datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # `datasets` raises many kinds for one cause
        if _is_gated(error):
            raise DataError(
                f"{repository} is gated: ask for access at https://huggingface.co/datasets/{repository}, then run "
                f"`hf auth login` or set HF_TOKEN; or give {instead}"
            ) from error
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot fetch {shown} from the hub ({line}); give {instead}") from error
    if not len(table):
        raise DataError(f"{shown} on the hub holds no rows; give {instead}")
    return table


def _is_gated(error: BaseException | None) -> bool:
    """Whether the hub refused access, as `datasets` says in words or as one of the causes it names."""
    from huggingface_hub.errors import GatedRepoError

    while error is not None:
        if isinstance(error, GatedRepoError) or "is a gated dataset" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
