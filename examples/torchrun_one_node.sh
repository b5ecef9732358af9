#!/usr/bin/env bash
# One node, one process per GPU:
#   bash examples/torchrun_one_node.sh examples/llama2-7b-to-1.3b.yaml run.folder=/data/runs/a
# GPUS: processes to start (default: the GPUs that nvidia-smi lists, else 1).
# Ctrl-C, SIGTERM or SIGUSR1 to this script stops the run at the next step with a checkpoint, and the same command goes
# on from there; a second one ends it at once.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: [GPUS=8] bash $0 FILE [KEY=VALUE ...]" >&2
    exit 2
fi
GPUS=${GPUS:-$( (nvidia-smi --list-gpus 2>/dev/null || echo cpu) | wc -l)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

setsid torchrun --standalone --nproc-per-node "$GPUS" -m megashear run "$@" &
launcher=$!
stopped=0

# torchrun kills its ranks 30 seconds after a SIGTERM, too soon for a large checkpoint, and dies of SIGUSR1 without
# telling them. So it is kept out of the terminal's signals (setsid), the ranks are told directly, and torchrun ends
# when they have.
stop() {
    if [ "$stopped" -eq 1 ]; then
        kill -TERM "$launcher" 2>/dev/null || true
    else
        stopped=1
        pkill -USR1 -P "$launcher" || true
    fi
}
trap stop USR1 TERM INT HUP

status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ended the wait, not the run
    status=0
    wait "$launcher" || status=$?
done

# torchrun turns every exit code of its ranks into 1: a stop that was asked for is 75 here, as without torchrun.
if [ "$stopped" -eq 1 ] && [ "$status" -ne 0 ]; then
    status=75
fi
exit "$status"
