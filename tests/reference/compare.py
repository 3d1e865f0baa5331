"""Compares served full-size models with transformers: random weights, the shipped configurations, every tensor-parallel size there is.

    python3 compare.py CONFIGS [--models NAME:DTYPE,...] [--sizes N,...] [--scratch DIR]

For each model: makes weights from a seed and writes them as a checkpoint, serves it, asks for ln p of prompts of 1 to 600 ids
(prefill) and for a greedy answer with its ln p (decode), and computes the same positions by transformers in float32 and in the
served type. Half precision differs from float32 by itself, so the measure is the reference's own difference: the mean of ours may
be a quarter above it, the largest twice as large, and where float32 leads by more than the reference's own largest difference (and
by 0.4) the likeliest token must be the same as often as the reference's. Wants torch and transformers, a GPU with memory for the model in float32, and disk for its checkpoint.
"""

import argparse
import gc
import os
import random
import shutil
import sys
import tempfile
import time

import torch
import transformers

from cluster import Cluster

PROMPT_LENGTHS = (1, 17, 300, 600)
ANSWER_LENGTH = 32
# Weights of this deviation give logits that are neither flat nor decided by one position.
DEVIATION = {"qwen1.5-0.5b": 0.05, "llama-3-8b": 0.03}
MARGIN = 0.4
MEAN_MAX, LARGEST_MAX = 1.25, 2.0


def make_model(config, dtype, deviation):
    """A model with random weights on the device, as the checkpoint's type."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, deviation)
    return model.eval()


class Served:
    """What one served model said: for each sequence its ids, and ln p and likeliest id of each position that was asked for."""

    def __init__(self, cluster, prompts):
        self.sequences = [self.ask(cluster, prompt) for prompt in prompts]

    @staticmethod
    def ask(cluster, prompt):
        prefill = cluster.ask({"prompt": prompt + [5], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 2})["prompt_logprobs"]
        ids = prompt + [5]
        found = []
        for position in range(1, len(ids)):
            entry = prefill[position]
            likeliest = max(entry, key=lambda token: entry[token]["logprob"])
            found.append((position, entry[str(ids[position])]["logprob"], int(likeliest)))
        answer = cluster.ask(
            {"prompt": prompt, "max_tokens": ANSWER_LENGTH, "temperature": 0, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
        )
        # A greedy token is the likeliest one.
        decoded = [(len(prompt) + step, logprob, token) for step, (token, logprob) in enumerate(zip(answer["token_ids"], answer["logprobs"]["token_logprobs"]))]
        return [("prefill", ids, found), ("decode", prompt + answer["token_ids"], decoded)]


def logprobs(model, ids):
    """ln p of all ids at each position, on the host."""
    with torch.no_grad():
        return model(torch.tensor([ids], device="cuda")).logits[0].float().log_softmax(-1).cpu()


class Tally:
    """Differences from float32 of us and of the reference in half precision."""

    def __init__(self):
        self.ours, self.halves = [], []
        # Of each position by how much float32's first leads, and whether it is first here and in the reference in half precision.
        self.leads = []

    def add(self, full, half, token, logprob, likeliest):
        self.ours.append(abs(logprob - full[token].item()))
        self.halves.append(abs(half[token].item() - full[token].item()))
        best = full.topk(2)
        first = best.indices[0].item()
        self.leads.append(((best.values[0] - best.values[1]).item(), likeliest == first, half.argmax().item() == first))

    def above(self, margin):
        """Positions where float32 leads by more; how many agree here, and in the reference in half precision."""
        led = [(ours, half) for lead, ours, half in self.leads if lead > margin]
        return len(led), sum(ours for ours, _ in led), sum(half for _, half in led)

    def judge(self, label):
        """Prints the figures; whether they are as near as they must be."""
        mean, largest = sum(self.ours) / len(self.ours), max(self.ours)
        mean_half, largest_half = sum(self.halves) / len(self.halves), max(self.halves)
        wide = max(MARGIN, largest_half)
        led, clear = self.above(MARGIN), self.above(wide)
        is_near = mean <= MEAN_MAX * mean_half and largest <= LARGEST_MAX * largest_half and clear[1] >= clear[2]
        print(
            f"{'ok  ' if is_near else 'FAIL'} {label}: |d ln p| from float32 mean {mean:.4f} max {largest:.4f}; transformers in this type "
            f"mean {mean_half:.4f} max {largest_half:.4f}; {len(self.ours)} positions; likeliest token the same at margins above {MARGIN}: "
            f"{led[1]} of {led[0]}, transformers {led[2]}; above {wide:.2f}: {clear[1]} of {clear[0]}, transformers {clear[2]}",
            flush=True,
        )
        return is_near


def compare(config_folder, name, dtype_name, sizes, folder):
    """Serves one model at every size and compares; whether all is near."""
    config, dtype = transformers.AutoConfig.from_pretrained(config_folder), getattr(torch, dtype_name)
    started = time.monotonic()
    model = make_model(config, dtype, DEVIATION.get(name, 0.03))
    model.save_pretrained(folder)
    model.to("cpu")
    gc.collect()
    torch.cuda.empty_cache()
    print(f"{name} {dtype_name}: written in {time.monotonic() - started:.1f} s", flush=True)
    rand = random.Random(1)
    prompts = [[rand.randrange(config.vocab_size) for _ in range(length)] for length in PROMPT_LENGTHS]
    served = {}
    with Cluster(max(sizes)) as cluster:
        for size in sizes:
            limits = ["--max-model-len", 2048, "--max-num-seqs", 16, "--gpu-memory-utilization", 0.7]
            took = cluster.serve(folder, "--tensor-parallel-size", size, "--dtype", dtype_name, *limits)
            print(f"{name} TP {size}: ready in {took:.1f} s", flush=True)
            served[size] = Served(cluster, prompts)
            cluster.undeploy()
    return judge(model, name, dtype_name, served)


def judge(model, name, dtype_name, served):
    """Computes what was served by the model itself, in its type and in float32."""
    sequences = {tuple(ids) for one in served.values() for parts in one.sequences for _, ids, _ in parts}
    model.to("cuda")
    halves = {ids: logprobs(model, list(ids)) for ids in sequences}
    torch.backends.cuda.matmul.allow_tf32 = False
    model.float()
    fulls = {ids: logprobs(model, list(ids)) for ids in sequences}
    is_near = True
    for size, one in served.items():
        tallies = {"prefill": Tally(), "decode": Tally()}
        for kind, ids, found in (part for parts in one.sequences for part in parts):
            full, half = fulls[tuple(ids)], halves[tuple(ids)]
            for position, logprob, likeliest in found:
                tallies[kind].add(full[position - 1], half[position - 1], ids[position], logprob, likeliest)
        for kind, tally in tallies.items():
            is_near &= tally.judge(f"{name} {dtype_name} TP {size} {kind}")
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return is_near


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", help="folder of model configurations")
    parser.add_argument("--models", default="qwen1.5-0.5b:float16,llama-3-8b:bfloat16")
    parser.add_argument("--sizes", help="tensor-parallel sizes [default: 1, and 2 where two devices are visible]")
    parser.add_argument("--scratch", help="where checkpoints are written; up to 17 GB at a time")
    arguments = parser.parse_args()
    num_devices = torch.cuda.device_count()
    if num_devices == 0:
        sys.exit("no GPU is visible")
    sizes = [int(size) for size in arguments.sizes.split(",")] if arguments.sizes else [1, 2][:num_devices]
    is_near = True
    for model in arguments.models.split(","):
        name, dtype_name = model.split(":")
        folder = tempfile.mkdtemp(prefix="phalanx-reference-", dir=arguments.scratch)
        try:
            is_near &= compare(os.path.join(arguments.configs, name), name, dtype_name, sizes, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0 if is_near else 1)


if __name__ == "__main__":
    main()
