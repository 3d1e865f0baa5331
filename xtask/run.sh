#!/bin/sh
# Runs what needs a GPU, from the folder that this script lies in. It wants a driver, and nothing else.
#
#   sh run.sh                      ops, then cluster
#   sh run.sh ops [FILTER...]      every op against the reference
#   sh run.sh cluster [FILTER...]  whole models through real processes and HTTP
#   sh run.sh nodes [FILTER...]    two nodes with a device each, which exchange through NCCL; needs two devices
#   sh run.sh sanitize             the ops under compute-sanitizer, where that is found: small shapes, recordings, two ranks
#   sh run.sh reference [OPTIONS]  models of full size against transformers, which must be there; see --help
#   sh run.sh repeat MODEL PROMPTS [OPTIONS]  the same greedy requests again and again, in every way; see --help
#   sh run.sh kill [OPTIONS]       kill -9 of ranks under 16 streams of Llama-3-8B; needs two devices; see --help
#   sh run.sh bench [OPTIONS]      the benchmark table; see `sh run.sh bench --help`
#
# CUDA_VISIBLE_DEVICES is respected. SmolLM2 is looked for in models/ beside this script.
set -u
here=$(cd "$(dirname "$0")" && pwd) || exit 1
export PHALANX_TEST_PROGRAMS="$here/bin"
export PHALANX_TEST_GOLDENS="$here/goldens"
export PHALANX_TEST_MODELS="${PHALANX_TEST_MODELS:-$here/models}"
export RUST_BACKTRACE="${RUST_BACKTRACE:-0}"
chmod +x "$here"/bin/* 2>/dev/null

ops() { "$here/bin/cuda" --test-threads=1 --nocapture "$@"; }
cluster() { "$here/bin/gpu" --test-threads=1 --nocapture "$@"; }
nodes() { "$here/bin/gpu_nodes" --test-threads=1 --nocapture "$@"; }

sanitize() {
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer 2>/dev/null | head -n 1)
    if [ -z "$tool" ]; then
        echo "compute-sanitizer is not here: it is in the package cuda-sanitizer of the CUDA toolkit" >&2
        return 1
    fi
    # Large shapes take minutes under the tool and reach no other code. A failed CUDA call is no error of memory access: the
    # library probes what the device can do.
    check="$tool --report-api-errors no --error-exitcode 9"
    $check --tool memcheck "$here/bin/cuda" --test-threads=1 --nocapture --skip large --skip two_ranks --skip recording || return
    # Recordings of one type: they hold the kernels that were checked, at addresses that must still be good.
    $check --tool memcheck "$here/bin/cuda" --test-threads=1 --nocapture --exact recording::f16 || return
    # Two processes, the second started by the first. NCCL's kernels are not ours, and a rank that comes late is no access.
    $check --tool memcheck --target-processes all "$here/bin/cuda" --test-threads=1 --nocapture --exact two_ranks::bf16 || return
    "$tool" --tool racecheck --error-exitcode 9 \
        "$here/bin/cuda" --test-threads=1 --nocapture --exact norms::f16 greedy::f32 scores::f32 embed::f16 edited_values::f32 || return
}

what=${1:-all}
[ $# -gt 0 ] && shift
case "$what" in
    all)
        ops; first=$?
        cluster; second=$?
        [ $first -eq 0 ] && [ $second -eq 0 ]
        ;;
    ops) ops "$@" ;;
    cluster) cluster "$@" ;;
    nodes) nodes "$@" ;;
    reference) python3 "$here/reference/compare.py" "$here/configs" "$@" ;;
    repeat) python3 "$here/reference/repeat.py" "$@" ;;
    kill) python3 "$here/reference/kill.py" "$here/configs/llama-3-8b" "$@" ;;
    sanitize) sanitize ;;
    bench) "$here/bin/xtask" bench-run --programs "$here/bin" --configs "$here/configs" "$@" ;;
    *) sed -n '2,16p' "$0" >&2; exit 2 ;;
esac
