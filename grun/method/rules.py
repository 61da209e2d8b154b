"""Names of where gates read and edits write, and which go together; read without torch."""

from __future__ import annotations

from grun.errors import ConfigError

READS = ("last_prompt", "every_token")
ACCUMULATIONS = ("none", "running_max")
WRITES = ("last_prompt", "sticky", "every_token")


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
