"""A Phalanx cluster inside a Ray cluster: one placement group, whose bundles each run one node.

    python phalanx_on_ray.py --nodes 2 --num-gpus 1 --serve /models/llama-3-8b -- --tensor-parallel-size 2

The first bundle runs the head and its own devices (`coordinator start --head`), every other one `worker join`. Ray decides
where; this program stays in the foreground and watches. A process that ends is started again. A bundle whose machine is
lost is placed anew by Ray as soon as another machine has room, and joins again; where that was the head's, the workers
follow it to its new address and what `--serve` named is deployed again. Ctrl-C ends all of it and removes the placement group.

It is a program of Ray, so it also runs as a job: `ray job submit --working-dir deploy/ray -- python phalanx_on_ray.py ...`.
`coordinator` and `worker` must be on the PATH of every machine, or in the folder that `--programs` names.
"""

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

PLACEMENT_DEADLINE_S = 60
START_DEADLINE_S = 30
CALL_DEADLINE_S = 60
STOP_DEADLINE_S = 20
POLL_S = 1.0
PR_SET_PDEATHSIG = 1


def say(text):
    print(f"phalanx: {text}", file=sys.stderr, flush=True)


def end_with_parent():
    """A node's processes end with the process of Ray that started them, in whatever way that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@ray.remote(max_restarts=0, max_concurrency=4)
class Node:
    """One bundle: the process of a head or of a worker's agent, on the machine that Ray chose."""

    def __init__(self, index, options):
        self.options = options
        self.home = os.path.join(options["home"], f"bundle-{index}")
        os.makedirs(self.home, mode=0o700, exist_ok=True)
        self.process = None

    def program(self, name):
        folder = self.options["programs"]
        return os.path.join(folder, name) if folder else name

    def environment(self):
        return {**os.environ, "PHALANX_HOME": self.home}

    def launch(self, *command):
        """Starts the process and gives the one line that it prints with `--json`."""
        started = threading.Event()

        def keep():
            # The kernel takes the end of the thread that started a process for the end of its parent, and Ray's threads come
            # and go: this one stays.
            with open(os.path.join(self.home, "ray.log"), "ab") as log:
                self.process = subprocess.Popen(
                    [self.program(command[0]), *command[1:]],
                    env=self.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    preexec_fn=end_with_parent,
                )
            started.set()
            self.process.wait()

        threading.Thread(target=keep, daemon=True).start()
        if not started.wait(START_DEADLINE_S):
            raise RuntimeError(f"{command[0]} was not started")
        return json.loads(self.process.stdout.readline() or b"{}")

    def slots(self):
        device = ["--device", self.options["device"]] if self.options["device"] else []
        return ["--num-gpus", str(self.options["slots"]), *device]

    def start_head(self):
        """Starts a head here. Gives what `start --json` prints, and a token for machines that join."""
        o, ip = self.options, ray.util.get_node_ip_address()
        started = self.launch(
            "coordinator", "start", "--head", "--block", "--json", *self.slots(),
            "--cluster-host", "0.0.0.0", "--advertise-address", ip, "--port", str(o["port"]),
            "--host", o["http_host"], "--http-port", str(o["http_port"]), "--dashboard-port", str(o["dashboard_port"]),
        )  # fmt: skip
        if not started:
            raise RuntimeError(f"the head did not start: {self.log()}")
        code, out, err = self.run("coordinator", "token", "create", "--json")
        if code != 0:
            raise RuntimeError(f"no token: {err}")
        return {**started, "token": json.loads(out)["token"], "ray_node": ray.get_runtime_context().get_node_id()}

    def start_worker(self, address, token):
        """Lets this machine's devices join the head at `address`."""
        os.environ["PHALANX_TOKEN"] = token
        return self.launch("worker", "join", "--block", "--json", "--address", address, *self.slots())

    def ended(self):
        """Why the process ended, or None while it runs."""
        if self.process is None:
            return "it was never started"
        code = self.process.poll()
        return None if code is None else f"exit code {code}: {self.log()}"

    def log(self, size=600):
        with open(os.path.join(self.home, "ray.log"), "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - size))
            return log.read().decode(errors="replace").strip()

    def run(self, *command, deadline_s=CALL_DEADLINE_S):
        """Runs one command to its end, in this node's home. Gives its exit code, stdout and stderr."""
        command = [self.program(command[0]), *command[1:]]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=deadline_s)
        return done.returncode, done.stdout, done.stderr

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()


class Cluster:
    """The placement group and what runs in its bundles."""

    def __init__(self, arguments):
        self.arguments = arguments
        bundle = {"CPU": arguments.num_cpus}
        if arguments.num_gpus and arguments.device != "cpu":
            bundle["GPU"] = arguments.num_gpus
        for label in arguments.resource:
            name, _, amount = label.partition("=")
            bundle[name] = float(amount or 1)
        self.bundle = bundle
        self.group = placement_group([bundle] * arguments.nodes, strategy=arguments.strategy)
        home = arguments.home or f"/tmp/phalanx-ray-{os.getuid()}"
        self.options = {
            "home": os.path.join(home, self.group.id.hex()[:12]),
            "programs": arguments.programs,
            "slots": arguments.num_gpus,
            "device": arguments.device,
            "port": arguments.port,
            "http_port": arguments.http_port,
            "http_host": arguments.http_host,
            "dashboard_port": arguments.dashboard_port,
        }
        self.nodes = {}
        self.starting = {}
        self.head = None
        self.deploying = None

    def wait(self):
        """Waits until Ray has placed the bundles. Says what is missing where it cannot."""
        if self.group.wait(PLACEMENT_DEADLINE_S):
            return
        free = {name: amount for name, amount in ray.available_resources().items() if ":" not in name}
        remove_placement_group(self.group)
        wanted = f"{self.arguments.nodes} x {self.bundle} ({self.arguments.strategy})"
        sys.exit(f"phalanx: Ray did not place {wanted} within {PLACEMENT_DEADLINE_S} s; free in all: {free}")

    def actor(self, index):
        where = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index)
        gpus = self.bundle.get("GPU", 0)
        made = Node.options(scheduling_strategy=where, num_cpus=self.bundle["CPU"], num_gpus=gpus)
        return made.remote(index, self.options)

    def begin(self, index):
        """Starts what bundle `index` runs, without waiting: Ray may first have to find another machine."""
        if index != 0 and self.head is None:
            return
        node = self.nodes[index] = self.actor(index)
        call = node.start_head.remote() if index == 0 else node.start_worker.remote(self.head["address"], self.head["token"])
        self.starting[index] = call

    def forget(self, index, reason):
        say(f"bundle {index}: {reason}; starting it again")
        self.starting.pop(index, None)
        node = self.nodes.pop(index, None)
        if node is not None:
            ray.kill(node)
        if index == 0:
            self.head, self.deploying = None, None

    def started(self, index, answer):
        if index != 0:
            say(f"bundle {index}: joined {self.head['address']}")
            return
        self.head = answer
        say(f"head at {answer['address']}, API at {answer['http']}, dashboard at {answer['dashboard']}")
        print(json.dumps({name: value for name, value in answer.items() if name != "token"}), flush=True)
        for other in range(1, self.arguments.nodes):
            if other in self.nodes:
                self.forget(other, "its head is another one now")
        if self.arguments.serve:
            command = ["coordinator", "serve", self.arguments.serve, "--wait", "10m", *self.arguments.flags]
            self.deploying = self.nodes[0].run.remote(*command, deadline_s=3600)

    def turn(self):
        """One look at every bundle."""
        for index in range(self.arguments.nodes):
            if index not in self.nodes:
                self.begin(index)
                continue
            try:
                self.look(index)
            except (ray.exceptions.RayError, RuntimeError) as error:
                self.forget(index, str(error).strip().splitlines()[0])

    def look(self, index):
        call = self.starting.get(index)
        if call is not None:
            if ray.wait([call], timeout=0)[0]:
                del self.starting[index]
                self.started(index, ray.get(call))
            return
        reason = ray.get(self.nodes[index].ended.remote(), timeout=CALL_DEADLINE_S)
        if reason:
            self.forget(index, reason)
        elif index == 0 and self.deploying is not None and ray.wait([self.deploying], timeout=0)[0]:
            code, out, err = ray.get(self.deploying)
            self.deploying = None
            say(f"{self.arguments.serve}: {(out or err).strip()}" + ("" if code == 0 else f" (exit code {code})"))

    def end(self):
        stops = [node.stop.remote() for node in self.nodes.values()]
        ray.wait(stops, num_returns=len(stops), timeout=STOP_DEADLINE_S + 5) if stops else None
        remove_placement_group(self.group)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray-address", default="auto", help="the Ray cluster [default: auto]")
    parser.add_argument("--nodes", type=int, default=1, help="bundles: machines of the cluster")
    parser.add_argument("--num-gpus", type=int, default=1, help="device slots of each; with --device cpu, slots on CPUs")
    parser.add_argument("--num-cpus", type=float, default=1, help="CPUs that Ray sets aside for each")
    parser.add_argument("--resource", action="append", default=[], metavar="NAME[=N]", help="a resource of Ray for each bundle")
    parser.add_argument("--device", choices=["auto", "cuda", "rocm", "cpu"], default=None)
    strategies = ["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
    parser.add_argument("--strategy", choices=strategies, default="STRICT_SPREAD", help="of Ray's placement group")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--http-host", default="0.0.0.0")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="Ray's own dashboard has 8265 too, on its head")
    parser.add_argument("--home", help="folder for each node's state [default: /tmp/phalanx-ray-UID]")
    parser.add_argument("--programs", help="folder of coordinator and worker")
    parser.add_argument("--serve", metavar="MODEL", help="deploy this model; what follows -- are flags of `coordinator serve`")
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    arguments = parse()
    ray.init(address=arguments.ray_address, log_to_driver=False)
    cluster = Cluster(arguments)
    # Also where it was started in the background by a shell, which has it ignore Ctrl-C.
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    try:
        cluster.wait()
        while True:
            cluster.turn()
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        say("ending")
    finally:
        cluster.end()


if __name__ == "__main__":
    main()
