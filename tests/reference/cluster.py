"""A cluster of packed programs, as scripts use it. Nothing but the standard library.

The programs lie where PHALANX_TEST_PROGRAMS says (run.sh sets it). A cluster has a folder and free ports of its own and ends with
its `with` block; where something failed, the ends of its logs are printed.
"""

import glob
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

PATIENCE = 300


class Failed(Exception):
    """A command or a request did not do what it should."""


class Cluster:
    def __init__(self, num_devices, device="cuda"):
        self.programs = os.environ["PHALANX_TEST_PROGRAMS"]
        self.home = tempfile.mkdtemp(prefix="phalanx-script-")
        self.flags = ["--device", device, "--num-gpus", num_devices, "--port", 0, "--http-port", 0, "--dashboard-port", 0]
        self.start_head()

    def start_head(self):
        """Starts the head; one that follows a dead one has its ports."""
        started = self.run("coordinator", "start", "--head", *self.flags, "--json")
        self.address = json.loads(started)["http"].removeprefix("http://")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None:
            self.print_logs()
        try:
            self.run("coordinator", "stop")
        except Failed as failed:
            print(failed, file=sys.stderr)
        shutil.rmtree(self.home, ignore_errors=True)

    def run(self, program, *arguments):
        """What a command prints; `Failed` with its words where it fails."""
        command = [os.path.join(self.programs, program), *map(str, arguments)]
        env = {**os.environ, "PHALANX_HOME": self.home}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode != 0:
            raise Failed(f"{' '.join(command[:3])} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def print_logs(self, num_lines=40):
        for path in sorted(glob.glob(os.path.join(self.home, "**", "*.log"), recursive=True)):
            with open(path, errors="replace") as file:
                print(f"---- {path}\n{''.join(file.readlines()[-num_lines:])}", file=sys.stderr)

    def serve(self, model, *flags):
        """Serves a model as `m`; seconds until it is ready."""
        started = time.monotonic()
        self.run("coordinator", "serve", model, "--served-model-name", "m", *flags)
        return time.monotonic() - started

    def undeploy(self):
        self.run("coordinator", "undeploy", "m")

    def status(self):
        return json.loads(self.run("coordinator", "status", "--json"))

    def ranks(self):
        """Process ids, in rank order."""
        return [rank["pid"] for rank in sorted(self.status()["ranks"], key=lambda rank: rank["rank"])]

    def post(self, body):
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)
        connection.request("POST", "/v1/completions", json.dumps({"model": "m", **body}), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise Failed(f"{answer.status}: {answer.read().decode(errors='replace')[:1000]}")
        return answer

    def ask(self, body):
        """The first choice of a completion."""
        return json.load(self.post(body))["choices"][0]

    def events(self, body):
        """The first choices of a stream, as they come; `Failed` where it ends otherwise than with [DONE]."""
        answer = self.post({**body, "stream": True})
        for line in answer:
            data = line.decode().removeprefix("data: ").strip()
            if data == "[DONE]":
                return
            if not line.startswith(b"data: "):
                continue
            event = json.loads(data)
            if "error" in event:
                raise Failed(f"the stream ended with {event['error']}")
            yield event["choices"][0]
        raise Failed("the stream was cut")
