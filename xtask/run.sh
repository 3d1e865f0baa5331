#!/bin/sh
# Runs what needs a GPU, from the folder that this script lies in. It wants a driver, and nothing else.
#
#   sh run.sh                      ops, then cluster
#   sh run.sh ops [FILTER...]      every op against the reference
#   sh run.sh cluster [FILTER...]  whole models through real processes and HTTP
#   sh run.sh sanitize             the ops' small shapes under compute-sanitizer, where that is found
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

sanitize() {
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer /usr/local/cuda*/compute-sanitizer/compute-sanitizer 2>/dev/null | head -n 1)
    if [ -z "$tool" ]; then
        echo "compute-sanitizer is not here: it is in the package cuda-sanitizer of the CUDA toolkit" >&2
        return 1
    fi
    # Large shapes and two processes take minutes under the tool and reach no other code. A failed CUDA call is no error of
    # memory access: the library probes what the device can do.
    quick="--skip large --skip two_ranks --skip recording"
    "$tool" --tool memcheck --report-api-errors no --error-exitcode 9 \
        "$here/bin/cuda" --test-threads=1 --nocapture $quick || return
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
    sanitize) sanitize ;;
    bench) "$here/bin/xtask" bench-run --programs "$here/bin" --configs "$here/configs" "$@" ;;
    *) sed -n '2,12p' "$0" >&2; exit 2 ;;
esac
