#!/usr/bin/env bash
# From a fresh clone to a sheared model: bash examples/quickstart.sh [--tiny] [RUN FOLDER]
#
# Installs megashear into .venv; collects text that the machine has anyway (four domains), trains a small tokenizer and a
# small LLaMA on it; shears that to half its parameters on two ranks (tensor parallel) and trains it on, with domain
# weights that follow the losses; exports it for transformers; trains its shape from random weights at as many tokens, to
# compare. All of it lies in the run folder (default: runs/quickstart). About five minutes on two cores, after the
# installation.
#
# What is done is not done again: after Ctrl-C, the same command goes on. Another run folder starts afresh.
# --tiny: little text and a few steps only, to try the script; its model is worth nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
here=examples/quickstart
share=1 source=() shear=() scratch=()
if [ "${1:-}" = --tiny ]; then
    share=0.05
    source=(pretrain.batch.steps=8 pretrain.optimizer.warmup_steps=1 pretrain.batch.eval_interval=4)
    shear=(prune.batch.steps=6 prune.batch.eval_interval=3 prune.sparsity_warmup_steps=3)
    shear+=(pretrain.batch.steps=6 pretrain.batch.eval_interval=3)
    scratch=(pretrain.batch.steps=12 pretrain.optimizer.warmup_steps=1 pretrain.batch.eval_interval=6)
    shift
fi
out=${1:-runs/quickstart}

bash tools/install.sh
export PATH="$PWD/.venv/bin:$PATH"
mkdir -p "$out"
trap 'status=$?; [ $status -eq 0 ] || echo "quickstart: ended with $status in step ${doing:-0}; the same command goes on" >&2' EXIT

source examples/two_ranks.sh # one rank on a single GPU: then there is no tensor parallelism either

# step NAME RESULT COMMAND...: run the command unless its result is there; note the seconds it took.
step() {
    doing=$1
    if [ -e "$2" ]; then
        echo "== $1: already done"
        return
    fi
    echo "== $1"
    local start=${EPOCHREALTIME//[!0-9]/} status=0 took
    "${@:3}" || status=$?
    took=$((${EPOCHREALTIME//[!0-9]/} - start))
    printf '%s %d.%06d\n' "$1" $((took / 1000000)) $((took % 1000000)) >>"$out/seconds.txt"
    return "$status"
}

run() { # run NAME [KEY=VALUE ...]: one run file of the quick start, in the run folder
    bash examples/torchrun_one_node.sh "$here/$1.yaml" "data.folder=$out/data" "${@:2}"
}

step text "$out/text" python $here/collect_text.py "$out/text" $share
step tokenizer "$out/tokenizer" python $here/train_tokenizer.py "$out/text" "$out/tokenizer" 2048
step data "$out/data" python tools/preprocess_data.py "$out/text" --tokenizer "$out/tokenizer" --output "$out/data" \
    --sequence-length 128 --heldout-sequences 100 --heldout-limit 0.1
step source "$out/source/summary.json" run source "run.folder=$out/source" "${source[@]}"
step shear "$out/sheared/summary.json" run shear "run.folder=$out/sheared" \
    "source.folder=$out/source/final" "parallel.tensor=$GPUS" "${shear[@]}"
step scratch "$out/scratch/summary.json" run scratch "run.folder=$out/scratch" "${scratch[@]}"

doing=summary
echo "== results"
python $here/summarise.py "$out"
echo
python examples/generate.py "$out/sheared/export" "def __init__(self"
cat <<EOF

Where things lie:
  $out/summary.json        the tables above
  $out/sheared/export      the sheared model, for transformers
  $out/sheared/plots       losses, sparsities and mixture over the steps
  $out/sheared/config.yaml every key of the run; docs/config.md explains them
Next: examples/smollm2.sh shears a real model; README.md tells how to shear your own.
EOF
