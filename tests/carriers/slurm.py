"""The job of deploy/slurm on a real Slurm: one machine, three nodes of one CPU each.

    python3 slurm.py PROGRAMS MODEL

A model at TP 2 over two of three nodes; the node of a rank is lost (its slurmd and all that it ran, by SIGKILL) and the third
takes over; the lost node comes back and joins again; the job is cancelled and nothing is left.
"""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from common import alive, answers_right, done, is_ready, processes_in, status, until

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "deploy" / "slurm"
NODES = 3
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=10
SlurmdParameters=config_overrides
MpiDefault=none
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=1 RealMemory=500
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def processes_with(mark):
    """Processes whose environment has `mark`."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def parents(pids):
    """The parents of these processes that are Slurm's."""
    found = set()
    for pid in pids:
        try:
            parent = int(re.search(r"PPid:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text()).group(1))
            if "slurmstepd" in pathlib.Path(f"/proc/{parent}/comm").read_text():
                found.add(parent)
        except (OSError, AttributeError):
            continue
    return found


def kill(pids):
    for pid in set(pids) - {os.getpid()}:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


class Slurm:
    """Its three kinds of daemons, below one folder."""

    def __init__(self, home):
        self.home = home
        host = os.uname().nodename.split(".")[0]
        port = 20000 + os.getpid() % 10000
        text = CONF.format(host=host, home=home, port=port, nodes=NODES, first=port + 1, last=port + NODES)
        (home / "slurm.conf").write_text(text)
        os.environ["SLURM_CONF"] = str(home / "slurm.conf")
        for folder in ["munge", "state"]:
            (home / folder).mkdir(mode=0o700)
        (home / "munge/key").write_bytes(os.urandom(1024))
        (home / "munge/key").chmod(0o600)
        parts = [f"--{name}={home}/munge/{name.split('-')[0]}" for name in ["key-file", "pid-file", "log-file", "seed-file", "socket"]]
        subprocess.run(["munged", "--force", *parts], check=True)
        # Whoever may reach the socket may ask for credentials: the folder above it is closed, and all here is root's.
        subprocess.run(["slurmctld"], check=True)
        for index in range(NODES):
            self.start_node(f"n{index + 1}")

    def start_node(self, name):
        subprocess.run(["slurmd", "-N", name], check=True)

    def lose_node(self, name):
        """The machine is gone: its slurmd, its steps and what they ran."""
        pids = processes_with(f"SLURMD_NODENAME={name}")
        kill([int((self.home / f"slurmd-{name}.pid").read_text()), *parents(pids), *pids])

    def stop(self):
        subprocess.run(["scontrol", "shutdown"], capture_output=True)
        time.sleep(0.5)
        for file in [*self.home.glob("*.pid"), self.home / "munge/pid"]:
            if file.exists():
                kill([int(file.read_text())])


def main():
    programs, model = sys.argv[1:]
    home = pathlib.Path(tempfile.mkdtemp(prefix="phalanx-slurm-"))
    os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
    slurm = Slurm(home)
    try:
        story(slurm, home, model)
    except SystemExit:
        for log in [home / "slurmctld.log", home / "job.txt", home / "step.log"]:
            if log.exists():
                print(f"---- {log.name}\n{log.read_text()[-3000:]}")
        raise
    finally:
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        time.sleep(1)
        slurm.stop()
        kill(processes_with(f"SLURM_CONF={home}/slurm.conf"))
        shutil.rmtree(home, ignore_errors=True)


def story(slurm, home, model):
    started = time.monotonic()
    until("three idle nodes", 30, lambda: subprocess.check_output(["sinfo", "-h", "-t", "idle", "-o", "%D"], text=True).strip() == str(NODES))
    done("Slurm with three nodes", started)

    ports = "--port 0 --http-port 0 --dashboard-port 0 --device cpu"
    settings = {"PHALANX_SCRIPTS": str(SCRIPTS), "PHALANX_STATE": str(home), "PHALANX_SLOTS": "1", "PHALANX_ADVERTISE": "127.0.0.1"}
    os.environ.update(settings, PHALANX_START_FLAGS=ports, PHALANX_JOB_DIR=str(home / "job"))
    serve = [model, "--served-model-name", "m", "--dtype", "float32", "--tensor-parallel-size", "2", "--placement-strategy", "spread", "--wait", "60s"]
    sbatch = ["sbatch", "--parsable", f"--nodes={NODES}", f"--chdir={home}", f"--output={home}/job.txt", str(SCRIPTS / "phalanx.sbatch")]
    job = subprocess.check_output([*sbatch, *serve], text=True).strip()
    until("the model is ready", 90, lambda: "m is ready" in (home / "job.txt").read_text())
    http = re.search(r"API +(\S+)/v1", (home / "job.txt").read_text()).group(1).replace(os.uname().nodename, "127.0.0.1")
    answers_right(http, "m", model)
    done(f"job {job} serves at TP 2 over two nodes", started)

    head_home = {**os.environ, "PHALANX_HOME": str(home / f"phalanx-{job}-n1")}
    run = lambda *command: subprocess.check_output(command, text=True, env=head_home, timeout=30)
    until("three nodes joined", 30, lambda: len(alive(status(run))) == NODES)
    ranks = {rank["node"]: rank["pid"] for rank in status(run)["ranks"]}
    lost = next(n for n in ["n2", "n3"] if set(processes_with(f"SLURMD_NODENAME={n}")) & set(ranks.values()))
    killed = time.monotonic()
    slurm.lose_node(lost)
    until("the third node takes over", 60, lambda: (now := status(run)) and is_ready(now, "m") and {r["node"]: r["pid"] for r in now["ranks"]} != ranks)
    until("the right ids after a lost node", 60, lambda: answers_right(http, "m", model))
    done(f"{lost} was lost; answered from the third node {time.monotonic() - killed:.1f} s later", started)

    slurm.start_node(lost)
    until("the node is back", 60, lambda: lost in subprocess.check_output(["sinfo", "-h", "-N", "-t", "alloc,mix,idle", "-o", "%N"], text=True).split())
    again = ["srun", f"--jobid={job}", "--nodes=1", "--ntasks=1", "--overlap", f"--nodelist={lost}", str(SCRIPTS / "node.sh")]
    step = subprocess.Popen(again, stdout=(home / "step.log").open("w"), stderr=subprocess.STDOUT)
    until("the node joined again", 60, lambda: len(alive(status(run))) == NODES)
    done(f"{lost} is back and joined again", started)

    subprocess.run(["scancel", job], check=True)
    until("nothing is left", 60, lambda: not processes_in(home))
    step.kill()
    done("cancelled, no process left", started)


if __name__ == "__main__":
    main()
