#!/usr/bin/env bash
# Runs all benchmarks of `flux-batch bench` on one CUDA device at full size, in under 8 minutes, without a network.
#
#   jobs/bench_gpu.sh [FOLDER]                 measure with 12 billion random weights; one JSON file per benchmark
#   DEVICE=cpu SIZE=tiny jobs/bench_gpu.sh     the same at a size for any machine
#
#   ONLY="kernels bf16" jobs/bench_gpu.sh      only these benchmarks
#
# The first benchmarks need a GPU: the attention kernel in use, the gain of fast accumulation and of the decoder's
# memory layouts, the correctness of odd sizes, and the milliseconds of a step in bfloat16 and fp8, with and without
# CUDA graphs. SGLang's CI measures 128.85 ms per step on an H100 (FLUX.1-dev, bfloat16, 1024 x 1024). Needs torch,
# transformers and the other packages that `flux_batch.pipeline.pipeline` imports. Skips benchmarks whose packages are
# missing, and says so. Runs the most important benchmarks first, ends each at its own time limit, and skips those for
# which no time is left (LIMIT_S seconds in all). You can stop it at any point: FOLDER has all figures measured so far.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-out/bench}}
python=${PYTHON:-python3}
size=${SIZE:-dev}
device=${DEVICE:-cuda}
limit_s=${LIMIT_S:-470}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} RAY_AUTH_MODE=${RAY_AUTH_MODE:-disabled} RAY_USAGE_STATS_ENABLED=0
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
mkdir -p "$out"
: > "$out/summary.txt"

# The lines of each benchmark that the summary at the end repeats.
short='^(whole call|a step|images|memory|against|attention|kernels|no fp8|decoder|[0-9]+ x|bare loops|job|Ray Data|the job|load|start|plan|noise-like, .* PNG)'

say() { echo "$*" | tee -a "$out/summary.txt"; }

# has PACKAGE...: succeeds if all packages are installed; does not import them.
has() { "$python" -c 'import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, sys.argv[1:])))' "$@"; }

# measure NAME SECONDS ARGUMENTS...: runs a benchmark, if SECONDS are left, and ends it after them. Writes NAME.json.
measure() {
    local name=$1 ends_s=$2 left_s=$((limit_s - SECONDS))
    shift 2
    if [[ -n ${ONLY:-} && " $ONLY " != *" $name "* ]]; then return; fi
    if ((left_s < ends_s)); then
        say "== $name: left out, $left_s s left of $limit_s, may take $ends_s"
        return
    fi
    # A hanging call to the device ignores SIGTERM, and would use up the time of all other benchmarks.
    timeout --kill-after=5 "$ends_s" "$python" -m flux_batch.cli bench "$@" --json "$out/$name.json" \
        > "$out/$name.txt" 2> "$out/$name.log"
    local code=$?
    say "== $name (at $SECONDS s)"
    if ((code == 124 || code == 137)); then
        say "ended after $ends_s s"
    elif ((code)); then
        say "failed with $code: $(tail -n 1 "$out/$name.log")"
    else
        cat "$out/$name.txt"
        grep -E "$short" "$out/$name.txt" >> "$out/summary.txt"
    fi
}

for package in torch transformers einops safetensors gguf fsspec pydantic yaml tenacity pyarrow PIL; do
    has "$package" || say "$package is missing: benchmarks that need it will fail"
done

weights=(--random-weights "$size" --device "$device")
side=1024 steps=28 images=${IMAGES:-10}
if [ "$size" = tiny ]; then side=64 steps=2 images=8; fi
image=(--width "$side" --height "$side" --steps "$steps")
# The time limits of benchmarks in seconds: guessed from 4 s per image, not measured. A pipeline benchmark makes 8
# images, a job benchmark 2 * IMAGES + 2. `cold` is for benchmarks that compile kernels first.
cold=${COLD_S:-150} large=100 small=60 whole=180

measure kernels "$cold" kernels --random-weights "$size" --device "$device" --side "$side"
few=("${image[@]}" --repeats 3)
measure bf16 "$cold" pipeline "${weights[@]}" "${few[@]}" --option compile=true
measure fp8 "$cold" pipeline "${weights[@]}" "${few[@]}" --option compile=true --quantization fp8_matmul
if [ "$device" = cuda ]; then
    graphs=(--option compile=true --option cuda_graphs=true)
    measure bf16-graphs "$large" pipeline "${weights[@]}" "${few[@]}" "${graphs[@]}"
    measure fp8-graphs "$large" pipeline "${weights[@]}" "${few[@]}" "${graphs[@]}" --quantization fp8_matmul
fi
peers=()
if has diffusers; then peers=(--against diffusers); else say "diffusers is missing: no comparison with it"; fi
# Each option in OPTIONS, e.g. OPTIONS="step_cache=0.1", is measured alone.
for option in ${OPTIONS:-}; do
    measure "bf16-$option" "$large" pipeline "${weights[@]}" "${few[@]}" --option "$option"
done
measure eager "$large" pipeline "${weights[@]}" "${few[@]}" "${peers[@]}" --option compile=false
half=(--width $((side / 2)) --height $((side / 2)) --steps "$steps" --repeats 3)
measure half-side-batch-4 "$cold" pipeline "${weights[@]}" "${half[@]}" --batch-size 4
if has ray; then
    measure job "$whole" job "${weights[@]}" "${image[@]}" --images "$images" --workers 1 --batch-size 1 --shard-size 5
else
    say "ray is missing: the job runs in this process, without it"
    measure job "$whole" job "${weights[@]}" "${image[@]}" --images "$images" --batch-size 1 --shard-size 5 --engine local
fi
if has diffusers; then
    measure compiled "$cold" pipeline "${weights[@]}" "${few[@]}" --against diffusers-compiled
fi
measure load "$large" load "${weights[@]}" --repeats 1
measure encode "$small" encode --repeats 3 --side "$side"
measure plan "$small" plan

echo
echo "took $SECONDS s; JSON and logs are in $out; in short:"
cat "$out/summary.txt"
