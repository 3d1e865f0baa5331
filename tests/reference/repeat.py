"""Asks the same greedy requests again and again, one at a time: what is computed alone must not depend on chance.

    python3 repeat.py MODEL PROMPTS [--size N] [--dtype TYPE] [--times N] [--tokens N]

MODEL is a model's folder or file, PROMPTS a JSON file of lists of ids (or the goldens of a model). For recorded and eager steps, and
for the sums of ours and those of NCCL where there are two ranks, it tells which answers part, and where. The first answer to a prompt
computes all of it and the others find most of it in the prefix cache, so half precision may let those two part; ends with 1 where two
answers of one kind do.
"""

import argparse
import collections
import json
import sys

from cluster import Cluster


def read_prompts(path):
    with open(path) as file:
        found = json.load(file)
    if isinstance(found, dict):
        found = [prompt["ids"] for prompt in found.get("prompts") or found["references"]["gguf"]]
    return found


def ask(cluster, prompt, num_tokens):
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
    choice = cluster.ask(body)
    return tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])


def parts_at(one, other):
    same = (at for at, (a, b) in enumerate(zip(one, other)) if a != b)
    return next(same, None)


def check(cluster, way, prompts, options):
    flags = ["--tensor-parallel-size", options.size, "--dtype", options.dtype, "--max-num-seqs", 8, *way]
    cluster.serve(options.model, *flags)
    answers = [[ask(cluster, prompt, options.tokens) for _ in range(options.times)] for prompt in prompts]
    cluster.undeploy()
    first = [found[1 if len(found) > 1 else 0] for found in answers]
    good = True
    for number, found in enumerate(answers):
        # The first one computes its whole prompt, the others find it in the cache.
        for name, group in (("first", found[:1]), ("cached", found[1:])):
            kinds = collections.Counter(group)
            if len(kinds) > 1:
                good = False
            base = first[number]
            for (ids, logprobs), count in kinds.items():
                if (ids, logprobs) == base:
                    continue
                at = parts_at(ids, base[0])
                lnp = parts_at(logprobs, base[1])
                print(f"  {' '.join(map(str, way)) or 'recorded'}, prompt {number}, {name}: {count} of {len(group)} part in ids at {at}, in ln p at {lnp}")
    print(f"{'ok  ' if good else 'FAIL'} {' '.join(map(str, way)) or 'recorded'}: {len(prompts)} prompts x {options.times}")
    return good, first


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--size", type=int, default=2, help="tensor-parallel size")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    prompts = read_prompts(options.prompts)
    ways = [[], ["--enforce-eager"]]
    if options.size > 1 and options.device == "cuda":
        ways += [["--disable-custom-all-reduce"], ["--disable-custom-all-reduce", "--enforce-eager"]]
    ways += [["--no-enable-prefix-caching"], ["--no-enable-prefix-caching", "--enforce-eager"]]
    with Cluster(options.size, options.device) as cluster:
        found = [check(cluster, way, prompts, options) for way in ways]
    for way, (_, first) in zip(ways[1:], found[1:]):
        for number, (mine, base) in enumerate(zip(first, found[0][1])):
            at, lnp = parts_at(mine[0], base[0]), parts_at(mine[1], base[1])
            if at is not None or lnp is not None:
                print(f"  {' '.join(way)} parts from recorded at prompt {number}: in ids at {at}, in ln p at {lnp}")
    sys.exit(0 if all(good for good, _ in found) else 1)


if __name__ == "__main__":
    main()
