"""What can be called in each of vLLM's workers by `collective_rpc`: its `worker_extension_cls`."""

from __future__ import annotations

from typing import Any

from grun.errors import GrunError
from grun_vllm.held import HELD


class GrunWorker:
    """Methods that vLLM adds to its worker."""

    def grun_requests(self) -> dict[str, Any]:
        """What is in force: folder, kind, and of each request what `InForce.told` says."""
        found = HELD[-1].edits.found
        return {"adapter": str(found.folder), "kind": found.kind, "requests": found.told()}

    def grun_prepare(self) -> dict[str, str]:
        """Read the store anew, and have its edits ready: its digest, or what stands in the way."""
        try:
            return {"digest": HELD[-1].prepare()}
        except (GrunError, MemoryError, RuntimeError) as error:  # torch's out of memory is a RuntimeError
            return {"error": str(error)}

    def grun_switch(self) -> None:
        """Put in force what was prepared; the scheduler is paused, and the key/value cache empty."""
        HELD[-1].switch()
