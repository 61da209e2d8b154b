"""Names of where gates read and edits write, and which go together; read without torch."""

from __future__ import annotations

from collections.abc import Sequence

from grun.errors import ConfigError

READS = ("last_prompt", "every_token")
ACCUMULATIONS = ("none", "running_max")
PROMPT = "prompt"
"""Where noise is written: at all tokens of a turn, up to the one where the gate is asked."""
WRITES = ("last_prompt", "sticky", "every_token", PROMPT)
POOLS = {"last": 1, "max": 1, "maxmin": 2, "mean": 1, "windows": 2}
"""How a gate for all edits pools states over tokens, and how many features each number of a state gives."""
WINDOWS = "windows"
"""The pool of which a gate reads many at once; see `grun.method.gating.WindowsGate`."""


def check_rule(gate_read: str, gate_accumulate: str, edit_write: str) -> None:
    """ConfigError lists what exists, or names what does not go together."""
    for name, value, known in (
        ("gate_read", gate_read, READS),
        ("gate_accumulate", gate_accumulate, ACCUMULATIONS),
        ("edit_write", edit_write, WRITES),
    ):
        if value not in known:
            raise ConfigError(f"{name}={value} does not exist; known: {', '.join(known)}")
    if gate_read == "every_token":
        if edit_write == PROMPT:
            raise ConfigError(f"edit_write={PROMPT} needs gate_read=last_prompt, which is asked once; set that")
        if (gate_accumulate, edit_write) == ("none", "last_prompt"):
            raise ConfigError(
                "gate_read=every_token with gate_accumulate=none and edit_write=last_prompt would read in vain; set "
                "gate_read=last_prompt, or gate_accumulate=running_max"
            )
        return
    if gate_accumulate != "none":
        raise ConfigError("gate_accumulate=running_max needs gate_read=every_token: one token has no maximum")
    if edit_write == "every_token":
        raise ConfigError("edit_write=every_token needs gate_read=every_token; with gate_read=last_prompt take sticky")


def check_pool(
    gate_blocks: Sequence[int | float] | None, gate_pool: str, gate_accumulate: str, gate: str, gate_read: str
) -> None:
    """ConfigError where one gate for all edits is asked for in a way that there is not."""
    if gate_pool not in POOLS:
        raise ConfigError(f"gate_pool={gate_pool} does not exist; known: {', '.join(POOLS)}")
    if gate_blocks is None:
        if gate_pool != "last":
            raise ConfigError(f"gate_pool={gate_pool} is for one gate for all edits: name gate_blocks, or leave it out")
        return
    if gate == "none":
        raise ConfigError("gate_blocks names where a gate reads, but there is no gate; leave gate_blocks out")
    if gate_pool == WINDOWS and gate_read != "last_prompt":
        raise ConfigError(f"gate_pool={WINDOWS} is read once a turn: set gate_read=last_prompt, or another gate_pool")
    if gate_accumulate != "none":
        raise ConfigError(
            f"gate_accumulate={gate_accumulate} does not go with gate_blocks, whose states are pooled already; leave "
            "one of them out"
        )


def check_shares(blocks: Sequence[int | float], name: str) -> list[float]:
    """The shares of the depth among `blocks`, numbers with a point; ConfigError for one that is not within (0, 1)."""
    shares = [block for block in blocks if isinstance(block, float)]
    if wrong := [share for share in shares if not 0 < share < 1]:
        raise ConfigError(
            f"{name} {list(blocks)}: {wrong[0]} is neither a block's number, which has no point, nor a share of the "
            "depth between 0 and 1"
        )
    return shares


def check_gate_blocks(gate_blocks: Sequence[int], blocks: Sequence[int]) -> None:
    """ConfigError for a gate that would be read after an edit that it weighs."""
    if max(gate_blocks) > min(blocks):
        raise ConfigError(
            f"gate_blocks {list(gate_blocks)} must not lie above the lowest edited block, {min(blocks)}: the gate is "
            "read before the edits that it weighs"
        )
