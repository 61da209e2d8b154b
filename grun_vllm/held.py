"""The edits of this process, and the custom operator through which its model calls them.

Behind an operator all that edits do is hidden from torch.compile and CUDA graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from grun_vllm.adapters import Shape, read_in_force
from grun_vllm.edits import Edits


class Held:
    """Edits in force, and those that are to take their place."""

    def __init__(self, edits: Edits, adapter: str, shape: Shape) -> None:
        """Of the folder or store `adapter`, on a base of that shape."""
        self.edits = edits
        self._adapter = adapter
        self._shape = shape
        self._next: Edits | None = None
        self._room = 0, 0
        self._resting = False

    def open(self, pages: int, page_size: int) -> None:
        """Tell how many pages the key/value cache has, and how many tokens a page."""
        self._room = pages, page_size
        self.edits.open(pages, page_size)

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Within the block the model is run on tokens of nobody, to warm up or to measure."""
        before, self._resting = self._resting, True
        try:
            yield
        finally:
            self._resting = before

    def apply(self, hidden: Tensor, residual: Tensor | None, block: int) -> None:
        """See `Edits.apply`."""
        if not self._resting:
            self.edits.apply(hidden, residual, block)

    def prepare(self) -> str:
        """Read anew what is in force, and have it ready; its digest. GrunError: it cannot be, and nothing changes."""
        self._next = None
        found = Edits(read_in_force(self._adapter, self._shape), self.edits.device, self.edits.dtype)
        found.open(*self._room)
        self._next = found
        return found.found.digest

    def switch(self) -> None:
        """Put in force what was prepared. The key/value cache is of the old edits, and must be empty."""
        if self._next is not None:
            self.edits, self._next = self._next, None


HELD: list[Held] = []
"""One in a process whose model has edits, else none."""


def grun_edit(hidden: Tensor, residual: Tensor | None, block: int) -> None:
    """Edit the states hidden + residual behind a block in place."""
    HELD[-1].apply(hidden, residual, block)


def register_operator() -> None:
    """Make the operator known to torch, once."""
    from vllm.utils.torch_utils import direct_register_custom_op

    if not hasattr(torch.ops.vllm, "grun_edit"):
        direct_register_custom_op(
            "grun_edit",
            grun_edit,
            mutates_args=["hidden", "residual"],
            fake_impl=lambda hidden, residual, block: None,
        )


def hook(block: int) -> Any:
    """A forward hook of a decoder block that gives (hidden, residual), or the states alone."""

    def edit(module: Any, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            torch.ops.vllm.grun_edit(output[0], output[1], block)
        else:
            torch.ops.vllm.grun_edit(output, None, block)

    return edit
