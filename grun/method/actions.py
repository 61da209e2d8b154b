"""Actions by name: what is done where a gate is open.

A new action is a function, or a class, of the token ids of a refusal under the decorator `action`. What it gives is
called with the logits of rows whose gate is open, and with the place of each in the answer; it gives others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from grun.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Act = Callable[["Tensor", "Tensor"], "Tensor"]
"""Takes logits [tokens, vocabulary] and places, int64 [tokens]: how many tokens of the answer stand before the one that
they predict. Gives finite logits of the same shape."""
ActionBuilder = Callable[[Sequence[int]], "Act | None"]
"""Takes the token ids of a refusal, its end included; gives None for what acts on hidden states, and is trained."""

ACTIONS: Registry[ActionBuilder] = Registry("action")

EDIT = "edit"
"""The published action."""
CERTAIN = 50.0
"""Logit of a token that is to come; all others have its negative. So its probability is 1 in every type up to a
temperature of 2.5, after a tangent that caps logits too, and what is computed of log-probabilities stays finite."""


action = ACTIONS.register
"""Decorator of a builder: takes the action's name, which the first paragraph of the docstring describes."""


@action(EDIT)
def edit(refusal: Sequence[int]) -> None:
    """The trained edit of hidden states, as strong as the gate is open."""


@action("refuse")
class Refuse:
    """A canned refusal in place of the model's answer; nothing is trained but the gate.

    Greedy answers, drawn ones and likelihoods are all those of the refusal, token by token, whatever stands in its
    place so far; after its end the end token comes again and again. Nothing of the model's own logits is left.
    """

    def __init__(self, refusal: Sequence[int]) -> None:
        self.refusal = list(refusal)

    def __call__(self, logits: Tensor, places: Tensor) -> Tensor:
        """See `Act`."""
        import torch  # not above: names of actions are read without it

        tokens = places.new_tensor(self.refusal)[places.clamp(max=len(self.refusal) - 1)]
        return torch.full_like(logits, -CERTAIN).scatter(1, tokens.unsqueeze(1), CERTAIN)
