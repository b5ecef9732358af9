#!/usr/bin/env bash
# Several nodes without a scheduler. Start it on every node, with the same FILE on a file system that all of them see:
#   NODES=2 HEAD=node0 bash examples/torchrun_many_nodes.sh examples/llama2-7b-to-2.7b.yaml
# NODES: how many nodes; HEAD: the host name of one of them, where the others meet; PORT: a free port there (29500);
# GPUS: processes per node (default: the GPUs that nvidia-smi lists, else 1); JOB: a name, if several jobs meet at HEAD.
# SIGTERM or SIGUSR1 to the script on any node stops the run everywhere at the next step, with a checkpoint.
set -euo pipefail

if [ $# -lt 1 ] || [ -z "${NODES:-}" ] || [ -z "${HEAD:-}" ]; then
    echo "usage: NODES=2 HEAD=HOST [PORT=29500] [GPUS=8] [JOB=megashear] bash $0 FILE [KEY=VALUE ...]" >&2
    exit 2
fi
GPUS=${GPUS:-$( (nvidia-smi --list-gpus 2>/dev/null || echo cpu) | wc -l)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

setsid torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${JOB:-megashear}" \
    -m megashear run "$@" &
launcher=$!
stopped=0

# The ranks are told directly; see torchrun_one_node.sh.
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
while kill -0 "$launcher" 2>/dev/null; do
    status=0
    wait "$launcher" || status=$?
done
if [ "$stopped" -eq 1 ] && [ "$status" -ne 0 ]; then
    status=75
fi
exit "$status"
