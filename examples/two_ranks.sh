# shellcheck shell=bash
# To be sourced: GPUS, the processes that examples/torchrun_one_node.sh starts, for examples that want two ranks. They
# share the cores, or take a GPU each; where there is one GPU, it is one rank. Also the threads of a rank.
GPUS=2
if [ "$(python -c 'from megashear.engine.device import uses_cuda; import torch
print(torch.cuda.device_count() if uses_cuda() else 0)')" -eq 1 ]; then
    GPUS=1
fi
threads=$((($(nproc) + 1) / 2))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads < 4 ? threads : 4))}
export GPUS OMP_NUM_THREADS
