"""What the tests of both carriers share: a golden, questions over HTTP, waiting with a deadline."""

import json
import os
import pathlib
import subprocess
import time
import urllib.request


def until(what, deadline_s, look):
    """Waits until `look` gives something true, and gives that. An error of `look` counts as not yet."""
    end, last = time.monotonic() + deadline_s, None
    while time.monotonic() < end:
        try:
            found = look()
            if found:
                return found
        except (OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
            last = error
        time.sleep(0.2)
    raise SystemExit(f"FAILED: {what}: not within {deadline_s} s ({last})")


def golden(folder):
    """A prompt of the golden of `folder` and the ids that follow it."""
    with open(os.path.join(folder, "goldens.json")) as file:
        prompt = json.load(file)["prompts"][0]
    return prompt["ids"], prompt["greedy"]["ids"]


def answers_right(http, model, folder):
    """Asks for a golden's ids over HTTP."""
    prompt, expected = golden(folder)
    fields = {"model": model, "prompt": prompt, "max_tokens": len(expected), "temperature": 0, "ignore_eos": True}
    body = json.dumps({**fields, "return_token_ids": True}).encode()
    request = urllib.request.Request(f"{http}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        ids = json.load(response)["choices"][0]["token_ids"]
    if ids != expected:
        raise SystemExit(f"FAILED: {ids} is not {expected}")
    return True


def status(run):
    """The head's `status --json`, by `run(command...) -> stdout`."""
    return json.loads(run("coordinator", "status", "--json"))


def is_ready(snapshot, model):
    """Whether the deployment is ready and each of its ranks too."""
    states = [deployment["state"] for deployment in snapshot["deployments"] if deployment["name"] == model]
    ranks = [rank["state"] for rank in snapshot["ranks"] if rank["deployment"] == model]
    return states == ["ready"] and set(ranks) == {"ready"}


def alive(snapshot):
    """Ids of the nodes that are alive."""
    return {node["id"] for node in snapshot["nodes"] if node["state"] == "alive"}


def processes_in(folder):
    """Processes of nodes whose home lies below `folder`."""
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if f"PHALANX_HOME={folder}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def done(what, started):
    """One line of the test's story."""
    print(f"ok  {what} ({time.monotonic() - started:.1f} s)", flush=True)
