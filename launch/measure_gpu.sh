#!/usr/bin/env bash
# The figures of the README that GPUs give: one published shape with random weights, over some of this machine's GPUs.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

usage() {
    cat <<'USAGE'
usage: launch/measure_gpu.sh TP [MODEL] [int8|int4]

Builds an engine of MODEL (llama-2-7b) over TP GPUs with random weights and adds its records to $RESULTS
(build/gpu.jsonl): build and load; decode of 1, 8 and 32 sequences (128 tokens in, 256 out) with the time to the first
token; prefill; 512 requests of 256 in, 256 out; 512 requests of mixed lengths. Quantized weights: decode only. The engine
stays in $ENGINES (build/engines); one that is there is measured as it is. `tpllm scale --report-only` draws records.

  for tp in 1 2 4; do launch/measure_gpu.sh $tp; done
  launch/measure_gpu.sh 1 llama-3-8b
  launch/measure_gpu.sh 1 llama-2-7b int8
  launch/measure_gpu.sh 4 llama-2-70b

Commit first: records name the commit, and whether the tree differs from it. TPLLM_VENV: see launch/env.sh; without that
environment, TPLLM_PYTHON runs the package as it lies here.
USAGE
}

case ${1:-} in -h | --help) usage; exit ;; esac
(($# >= 1)) || { usage >&2; exit 2; }
tp=$1 model=${2:-llama-2-7b} precision=${3:-}
cd "$TPLLM_ROOT"
RESULTS=${RESULTS:-build/gpu.jsonl}
ENGINES=${ENGINES:-build/engines}
engine=$ENGINES/$model-tp$tp${precision:+-$precision}

python=$TPLLM_VENV/bin/python
[ -x "$python" ] || { python=$TPLLM_PYTHON && export PYTHONPATH=$TPLLM_ROOT${PYTHONPATH:+:$PYTHONPATH}; }

quantized=()
[ -z "$precision" ] || quantized=(--use-weight-only --weight-only-precision "$precision")

bench() {
    "$python" -m tpllm launch -n "$tp" bench --model "$model" --device cuda --engine-dir "$engine" \
        --output-file "$RESULTS" "$@" </dev/null
}

mkdir -p "$ENGINES"
bench "${quantized[@]}" --max-batch-size 512 --max-input-len 1900 --max-seq-len 2412 --batch-sizes 1 8 32 \
    --input-len 128 --output-len 256 --prefill-lens 128 1024
[ -z "$precision" ] || exit 0
bench --batch-sizes --num-requests 512 --concurrency 512 --input-len 256 --output-len 256
bench --batch-sizes --num-requests 512 --concurrency 512 --input-len 1900 --output-len 512 --mixed
