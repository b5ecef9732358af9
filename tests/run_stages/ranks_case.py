"""Runs under torchrun: `torchrun ... -m run_stages.ranks_case JOBS.json`; each job is a run file and where to stop it.

A job: {"file": run file, "overrides": [...], "stop": [[stage, step], ...], "finish": bool}. The signal goes to the last
rank alone, and all of them must stop. Several jobs share one start of the ranks.
"""

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from megashear.config.load import load_config
from megashear.config.schema import ParallelConfig
from megashear.engine.layout import distributed
from run_stages.tiny import break_off, finish, send_signal


def signal_the_last_rank() -> None:
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        send_signal()


def main() -> None:
    with distributed(ParallelConfig()), patch.object(dist, "destroy_process_group"):
        for job in json.loads(Path(sys.argv[1]).read_text()):
            config = load_config(Path(job["file"]), job["overrides"])
            for stage, step in job["stop"]:
                assert break_off(config, (stage, step), signal_the_last_rank)
            if job["finish"]:
                finish(config)


if __name__ == "__main__":
    main()
