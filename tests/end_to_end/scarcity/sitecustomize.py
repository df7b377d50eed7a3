"""On PYTHONPATH, makes a shard run out of memory where a test says so.

The file that SCARCITY names holds a JSON object: rank, and the most rows that the activation
between the feed-forward's multiplications has room for. The shards must compute with the reference
backend.
"""

import json
import os
import sys
from pathlib import Path


def _make_scarce(control: Path) -> None:
    import torch

    from tessera.shard.backends.reference import ReferenceBackend

    plentiful = ReferenceBackend.silu_mul
    rank = int(os.environ.get("RANK", "0"))

    def scarce(self: ReferenceBackend, gate_up_TF: torch.Tensor) -> torch.Tensor:
        told = json.loads(control.read_text())
        if rank == told["rank"] and gate_up_TF.shape[0] > told["rows"]:
            raise torch.OutOfMemoryError(f"no room for {gate_up_TF.shape[0]} rows")
        return plentiful(self, gate_up_TF)

    ReferenceBackend.silu_mul = scarce  # type: ignore[method-assign]


if "tessera.shard.main" in sys.orig_argv and "SCARCITY" in os.environ:
    _make_scarce(Path(os.environ["SCARCITY"]))
