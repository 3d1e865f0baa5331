#!/bin/sh
# What one node of a Slurm job runs; phalanx.sbatch starts it. On the first node a head with its devices, elsewhere a worker's
# agent, each started again when it ends. `node.sh serve ...` runs that command of `coordinator` in the head's home, once there is a head.
set -u
node=${SLURMD_NODENAME:-$(hostname)}
export PHALANX_HOME="${PHALANX_STATE:-/tmp}/phalanx-$SLURM_JOB_ID-$node"
PHALANX_JOB_DIR=${PHALANX_JOB_DIR:-$SLURM_SUBMIT_DIR/phalanx-$SLURM_JOB_ID}
head_node=$(cat "$PHALANX_JOB_DIR/head-node") || exit 1
slots=${PHALANX_SLOTS:+--num-gpus $PHALANX_SLOTS}
address=$PHALANX_JOB_DIR/head
umask 077
mkdir -p "$PHALANX_HOME"

# The head's address for the others, once it answers: the head itself has put a token for them beside it.
publish() {
    for _ in $(seq 60); do
        where=$(coordinator status --json 2>/dev/null | sed -n 's/.*"head": *{[^}]*"address": *"\([^"]*\)".*/\1/p')
        if [ -n "$where" ]; then
            echo "$where" >"$address.new" && mv "$address.new" "$address"
            echo "phalanx: the head is at $where"
            return
        fi
        sleep 0.5
    done
    echo "phalanx: the head did not answer within 30 s" >&2
}

wait_for_head() {
    until [ -r "$address" ]; do sleep 0.5; done
    PHALANX_ADDRESS=$(cat "$address")
    PHALANX_TOKEN_FILE=$PHALANX_JOB_DIR/token
    export PHALANX_ADDRESS PHALANX_TOKEN_FILE
}

if [ $# -gt 0 ]; then
    wait_for_head
    unset PHALANX_ADDRESS PHALANX_TOKEN_FILE
    exec coordinator "$@"
fi

child=
trap 'trap - TERM; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null; wait "$child" 2>/dev/null; exit 0' TERM INT
while :; do
    if [ "$node" = "$head_node" ]; then
        # shellcheck disable=SC2086
        coordinator start --head --block --cluster-host 0.0.0.0 --advertise-address "${PHALANX_ADVERTISE:-$node}" --host 0.0.0.0 \
            --join-token-file "$PHALANX_JOB_DIR/token" $slots ${PHALANX_START_FLAGS:-} &
        child=$!
        publish
    else
        wait_for_head
        # shellcheck disable=SC2086
        worker join --block $slots &
        child=$!
    fi
    wait "$child"
    echo "phalanx: $node ended with code $?; starting it again" >&2
    sleep 1
done
