"""Kills ranks and the head of a served model while streams run: what its users and its devices notice.

    python3 kill.py CONFIG [--size N] [--streams N] [--tokens N] [--kills N] [--head-kills N] [--dtype TYPE] [--serve-flags FLAGS]

Serves made-up weights (the same in every run), takes the texts of greedy streams that run undisturbed, and then, for each kill,
runs the same streams again and ends one rank by `kill -9` while all of them decode. Prints for each kill the longest pause of any
stream, how long the old processes stayed, when the group was ready again, how many texts are equal to the undisturbed ones, and the
memory in use on each device. Then it kills the head as often as it is told to, starts it again, and prints how soon connections
were closed, when the deployment was ready again, by the same ranks, and the same of texts that are asked for anew. Fails where a stream is lost, a pause reaches ten seconds, a head takes three seconds or its ranks start again, a text differs at a token that was not
nearly a tie, or memory is not as before. Nothing but the standard library.
"""

import argparse
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

from cluster import Cluster, Failed

PAUSE_MAX = 10.0
PROCESS_END_MAX = 30.0
# Connections of a dead head are closed, and its deployment is ready after it has been started again.
CLOSED_MAX, HEAD_BACK_MAX = 1.0, 3.0
PROMPT_LENGTH = 128
# Tokens that every stream has when a rank is killed.
NUM_BEFORE = 100
# Two best tokens nearer than this, by ln p, may change places in half precision.
MARGIN_MAX = 0.5
# What other things on a machine may take, and what a start may take more or less than another.
MEMORY_SLACK_MIB = 256
POLL = 0.01


class Stream(threading.Thread):
    """One request, read as it comes."""

    def __init__(self, cluster, prompt, num_tokens):
        super().__init__(daemon=True)
        self.cluster, self.prompt, self.num_tokens = cluster, prompt, num_tokens
        self.token_ids, self.pause, self.error = [], 0.0, None
        self.start()

    def run(self):
        body = {"prompt": self.prompt, "max_tokens": self.num_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        last = time.monotonic()
        try:
            for choice in self.cluster.events(body):
                now = time.monotonic()
                self.pause, last = max(self.pause, now - last), now
                self.token_ids += choice.get("token_ids") or []
        except (Failed, OSError, ValueError) as error:
            self.error = error


def used_mib(device):
    """Memory in use on each device: as nvidia-smi tells, or as its library does where the program is not installed."""
    if device != "cuda":
        return []
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=60)
        if told.returncode == 0:
            return [int(line) for line in told.stdout.split()]
    except FileNotFoundError:
        pass
    return used_mib_by_library()


def used_mib_by_library():
    class Memory(ctypes.Structure):
        _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]

    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    count, used = ctypes.c_uint(), []
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        sys.exit("the driver tells no memory in use")
    for index in range(count.value):
        device, memory = ctypes.c_void_p(), Memory()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) or nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)):
            sys.exit(f"the driver tells no memory in use of device {index}")
        used.append(memory.used >> 20)
    return used


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(what, deadline, check):
    """Seconds until `check` holds."""
    started = time.monotonic()
    while not check():
        if time.monotonic() - started > deadline:
            raise Failed(f"waited {deadline} s for {what}")
        time.sleep(POLL)
    return time.monotonic() - started


def margin(cluster, stream, step):
    """How far the two best tokens of a step are apart, by ln p."""
    ids = stream.prompt + stream.token_ids[: step + 1]
    choice = cluster.ask({"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 2})
    best = sorted((entry["logprob"] for entry in choice["prompt_logprobs"][len(stream.prompt) + step].values()), reverse=True)
    return best[0] - best[1]


def compare(cluster, expected, streams, label):
    """Prints how many texts are equal, and where the others part; whether all that differ part at a near tie."""
    parted = []
    for index, (then, now) in enumerate(zip(expected, streams)):
        if then.token_ids != now.token_ids:
            steps = range(min(len(then.token_ids), len(now.token_ids)))
            step = next((step for step in steps if then.token_ids[step] != now.token_ids[step]), None)
            parted.append((index, step, None if step is None else margin(cluster, then, step)))
    where = ", ".join(f"stream {i} at {'its length' if s is None else f'token {s} (margin {m:.3f})'}" for i, s, m in parted)
    print(f"{label}: {len(streams) - len(parted)} of {len(streams)} texts equal{'; others part: ' + where if where else ''}", flush=True)
    return all(m is not None and m <= MARGIN_MAX for _, _, m in parted)


def finish(streams):
    """Waits for all of them."""
    for stream in streams:
        stream.join()
        if stream.error is not None:
            raise Failed(f"a stream was lost after {len(stream.token_ids)} tokens: {stream.error}")
    return streams


def undisturbed(cluster, start):
    """The texts that streams should have, and how alike two runs without a kill are."""
    # The first run brings the prompts into the prefix cache, so that those behind it begin alike.
    finish(start())
    expected = finish(start())
    compare(cluster, expected, finish(start()), "undisturbed, twice")
    return expected


def kill_once(cluster, start, expected, number, ready_mib, device):
    """One kill in the middle of all streams; whether all was as it should be."""
    pids = cluster.ranks()
    victim = pids[-1 - number % len(pids)]
    streams = start()
    wait_for("all streams to decode", 120, lambda: all(len(stream.token_ids) >= NUM_BEFORE or stream.error for stream in streams))
    os.kill(victim, signal.SIGKILL)
    started = time.monotonic()
    gone = wait_for(f"{pids} to end", PROCESS_END_MAX, lambda: not any(is_alive(pid) for pid in pids))
    wait_for("the group to be ready again", 300, lambda: is_ready(cluster, pids))
    ready = time.monotonic() - started
    finish(streams)
    pause, memory = max(stream.pause for stream in streams), used_mib(device)
    label = f"kill {number + 1} (rank {pids.index(victim)})"
    print(
        f"{label}: longest pause {pause:.2f} s, processes gone after {gone:.2f} s, ready after {ready:.2f} s; memory {memory} MiB",
        flush=True,
    )
    is_exact = compare(cluster, expected, streams, label)
    is_steady = all(abs(now - then) <= MEMORY_SLACK_MIB for now, then in zip(memory, ready_mib))
    return is_exact and is_steady and pause < PAUSE_MAX


def kill_head_once(cluster, start, expected, number):
    """Kills the head in the middle of all streams, and starts it again; whether its ranks went on with their weights."""
    pids, streams = cluster.ranks(), start()
    wait_for("all streams to decode", 120, lambda: all(len(stream.token_ids) >= NUM_BEFORE or stream.error for stream in streams))
    os.kill(cluster.status()["head"]["pid"], signal.SIGKILL)
    started = time.monotonic()
    for stream in streams:
        stream.join(PAUSE_MAX)
    closed = time.monotonic() - started
    lost = sum(stream.error is not None for stream in streams)
    started = time.monotonic()
    cluster.start_head()
    wait_for("the deployment to be ready", 300, lambda: cluster.status()["deployments"][0]["state"] == "ready")
    ready, kept = time.monotonic() - started, cluster.ranks() == pids
    label = f"head {number + 1}"
    words = "the same ranks" if kept else "OTHER RANKS"
    print(f"{label}: {lost} connections closed after {closed:.2f} s, ready {ready:.2f} s after the start, {words}", flush=True)
    is_exact = compare(cluster, expected, finish(start()), label)
    return is_exact and kept and lost == len(streams) and closed < CLOSED_MAX and ready < HEAD_BACK_MAX


def is_ready(cluster, old):
    status = cluster.status()
    pids = {rank["pid"] for rank in status["ranks"] if rank["state"] == "ready"}
    return status["deployments"][0]["state"] == "ready" and len(pids) == len(old) and pids != set(old)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="folder of a model's configuration")
    parser.add_argument("--size", type=int, default=2, help="tensor-parallel size")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=800, help="tokens of each stream")
    parser.add_argument("--kills", type=int, default=3, help="at most five: a group that falls more often is given up")
    parser.add_argument("--head-kills", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda", help="cpu: to try this script where there is no GPU")
    parser.add_argument("--serve-flags", default="", help="more flags of `coordinator serve`")
    arguments = parser.parse_args()
    with open(os.path.join(arguments.config, "config.json")) as file:
        vocabulary = json.load(file)["vocab_size"]
    rand = random.Random(3)
    prompts = [[rand.randrange(vocabulary) for _ in range(PROMPT_LENGTH)] for _ in range(arguments.streams)]
    before = used_mib(arguments.device)
    is_well = True
    with Cluster(arguments.size, arguments.device) as cluster:
        length = PROMPT_LENGTH + arguments.tokens + 16
        flags = ["--load-format", "dummy", "--dtype", arguments.dtype, "--max-model-len", length, "--max-num-seqs", 64]
        took = cluster.serve(arguments.config, "--tensor-parallel-size", arguments.size, *flags, *arguments.serve_flags.split())
        print(f"ready in {took:.2f} s; memory {before} MiB before, {used_mib(arguments.device)} MiB now", flush=True)
        start = lambda: [Stream(cluster, prompt, arguments.tokens) for prompt in prompts]
        expected = undisturbed(cluster, start)
        ready_mib = used_mib(arguments.device)
        for number in range(arguments.kills):
            is_well &= kill_once(cluster, start, expected, number, ready_mib, arguments.device)
        for number in range(arguments.head_kills):
            is_well &= kill_head_once(cluster, start, expected, number)
    after = used_mib(arguments.device)
    print(f"memory when all has ended: {after} MiB", flush=True)
    is_well &= all(now <= then + MEMORY_SLACK_MIB for now, then in zip(after, before))
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
