"""Server loop of every rank of `ranks.Ranks`: read calls on rank 0, make them on all ranks, write rank 0's answers.

Ranks that wait leave the cores to others: a group's thread polls a hundred times a second for as long as anything
refers to the group, uncollected cycles included, and a rank creates about fifty groups.

An exception on any rank ends it, upon which torchrun ends the others. torch is imported inside `main`: saving a
checkpoint spawns a process that imports this module again and needs none of it.
"""

import gc
import importlib
import json
import os
import sys
from typing import Any


def call(function: str, arguments: dict[str, Any]) -> Any:
    """Call `module:function`; `ping` does nothing."""
    if function == "ping":
        return None
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)(**arguments)


def main() -> None:
    import torch

    import helpers.jobs  # noqa: F401  # most calls need what it imports: part of the start, not of the first call
    from megashear.config.schema import ParallelConfig
    from megashear.engine.collectives import broadcast_object
    from megashear.engine.layout import distributed, end_groups

    with distributed(ParallelConfig()) as layout:
        while line := broadcast_object(sys.stdin.readline() if layout.is_main else None):
            job = json.loads(line)
            result = call(job["function"], job["arguments"])
            if layout.is_main:
                torch.save(result, job["answer"] + ".part")
                os.replace(job["answer"] + ".part", job["answer"])
            del result
            end_groups()
            gc.collect()
        sys.stdout.flush()
        os._exit(0)  # torch takes seconds to close the sockets, and nothing is left to save


if __name__ == "__main__":
    main()
