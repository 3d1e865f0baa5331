"""deploy/ray on a real Ray cluster: one machine, several nodes of Ray.

    python3 on_ray.py PROGRAMS MODEL

A placement group of two bundles over three nodes, a model at TP 2; the node of a rank is lost, Ray places its bundle on the third
node, and the model answers again; the program is ended and nothing is left.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from ray.cluster_utils import Cluster

from common import alive, answers_right, done, is_ready, processes_in, status, until

PROGRAM = pathlib.Path(__file__).resolve().parents[2] / "deploy" / "ray" / "phalanx_on_ray.py"


def main():
    programs, model = sys.argv[1:]
    home = pathlib.Path(tempfile.mkdtemp(prefix="phalanx-ray-"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    command = [sys.executable, str(PROGRAM), "--ray-address", cluster.address, "--nodes", "2", "--device", "cpu", "--home", str(home)]
    command += ["--port", "0", "--http-port", "0", "--http-host", "127.0.0.1", "--dashboard-port", "0", "--programs", programs, "--serve", model, "--"]
    command += ["--served-model-name", "m", "--dtype", "float32", "--tensor-parallel-size", "2", "--placement-strategy", "spread"]
    log = open(home / "log", "w+b")
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    try:
        story(cluster, nodes, program, home, programs, model)
    except SystemExit:
        for path in [home / "log", *home.glob("*/bundle-*/ray.log")]:
            print(f"---- {path}\n{path.read_text()[-3000:]}")
        raise
    finally:
        program.kill()
        cluster.shutdown()
        shutil.rmtree(home, ignore_errors=True)


def story(cluster, nodes, program, home, programs, model):
    started = time.monotonic()
    head = json.loads(program.stdout.readline() or b"{}")
    if not head:
        raise SystemExit("FAILED: no head")
    done(f"Ray placed two bundles, head at {head['address']}", started)
    bundles = next(home.glob("*/bundle-0")).parent
    environment = {**os.environ, "PHALANX_HOME": str(bundles / "bundle-0")}

    def run(name, *rest):
        return subprocess.check_output([os.path.join(programs, name), *rest], text=True, env=environment, timeout=30)

    until("the model is ready", 90, lambda: is_ready(status(run), "m"))
    answers_right(head["http"], "m", model)
    done("a model at TP 2 over two nodes of Ray", started)

    # The head's bundle may be on either node; the other one is lost, and a third one is there for it.
    lost = next(node for node in nodes if node.node_id != head["ray_node"])
    before = {rank["pid"] for rank in status(run)["ranks"]}
    cluster.add_node(num_cpus=1)
    killed = time.monotonic()
    cluster.remove_node(lost, allow_graceful=False)
    until("the bundle is placed anew", 120, lambda: (now := status(run)) and is_ready(now, "m") and not before <= {r["pid"] for r in now["ranks"]})
    until("the right ids after a lost node", 60, lambda: answers_right(head["http"], "m", model))
    assert len(alive(status(run))) == 2
    done(f"a node was lost; answered from another one {time.monotonic() - killed:.1f} s later", started)

    program.send_signal(signal.SIGINT)
    program.wait(60)
    until("nothing is left", 60, lambda: not processes_in(home))
    done("ended, no process left", started)


if __name__ == "__main__":
    main()
