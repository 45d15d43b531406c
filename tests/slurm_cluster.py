"""A real SLURM cluster on this machine, for tests: munged, slurmctld, slurmd and their own configuration.

python tests/slurm_cluster.py COMMAND ...     # runs the command with sbatch, squeue ... talking to that cluster

Needs the programs of Debian's slurm-wlm and munge (`.ci/packages.sh` installs them), but no service that is set up or
running: keys, sockets, ports, logs and state are all in one temporary folder. It runs as root or as any user, whose
jobs then run as that user. Tasks share the node; there is no accounting database and nothing needs cgroups. Several
nodes are several slurmd, all on this machine; their names are known to SLURM alone.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from ports import free_port

PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo"]
_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])

_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={num_cpus} CoresPerSocket={num_cpus} "
    "RealMemory=2000 State=UNKNOWN"
)
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
AuthType=auth/munge
# A requeued task starts again once its credential has expired; 5 s is the least.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Everything at once: a test does not wait for a scheduling cycle made for thousands of jobs.
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1
MaxArraySize={max_array_size}
# slurm/train.sbatch makes a port of a job's number, and another test's cluster may run on this machine.
FirstJobId={first_job}
KillWait=2
# As on real clusters: a node that is gone is noticed after minutes, and one on a busy machine is not taken for it.
SlurmdTimeout=300
MinJobAge=300
ReturnToService=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing_programs() -> list[str]:
    """The programs that a cluster needs and that are not on this machine."""
    return [name for name in PROGRAMS if shutil.which(name, path=_SEARCH_PATH) is None]


@dataclass
class Cluster:
    """A running cluster. Its folder has the logs and `slurm.conf`."""

    folder: Path
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """The slurmd of each node."""

    def start_node(self, name: str) -> None:
        self.nodes[name] = _start(self.folder, "slurmd", "-D", "-c", "-N", name)

    def lose_node(self, name: str) -> None:
        """Kill a node as a power cut does: slurmd and the steps that it started; what these started is killed too."""
        self.nodes[name].kill()
        self.nodes[name].wait()
        steps = [one for one in psutil.process_iter(["name"]) if one.info["name"] == "slurmstepd" and _is_of(one, name)]
        assert steps, f"nothing runs on {name}"
        for step in steps:
            _kill_tree(step)


def _is_of(process: psutil.Process, node: str) -> bool:
    """Whether a slurmstepd belongs to a node of this cluster: the variables of what it started say so."""
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            variables = child.environ()
            return (variables.get("SLURM_CONF"), variables.get("SLURMD_NODENAME")) == (os.environ["SLURM_CONF"], node)
    return False


def _kill_tree(process: psutil.Process) -> None:
    for one in [*process.children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


@contextlib.contextmanager
def slurm_cluster(*, num_cpus: int = 2, max_array_size: int = 1001, num_nodes: int = 1) -> Iterator[Cluster]:
    """Start the cluster of nodes of `num_cpus` each, yield it, stop it with all its jobs.

    The programs find it by the environment variable SLURM_CONF, which is set meanwhile. One node has this machine's
    name, several are called node1, node2, ...
    """
    # A socket's path is limited to about 100 characters: TMPDIR may be deep.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    host = socket.gethostname().split(".")[0]
    names = [host] if num_nodes == 1 else [f"node{i}" for i in range(1, num_nodes + 1)]
    before = os.environ.get("SLURM_CONF")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        configuration = _configure(folder, names, num_cpus, max_array_size)
        stack.callback(_stop, _start(folder, "munged", *_munge_arguments(folder)))
        _wait_until(lambda: (folder / "munge.socket").exists(), folder)
        os.environ["SLURM_CONF"] = str(configuration)
        stack.callback(_restore, before)
        stack.callback(_stop, _start(folder, "slurmctld", "-D", "-c", "-i"))
        cluster = Cluster(folder)
        stack.callback(lambda: [_stop(node) for node in cluster.nodes.values()])
        for name in names:
            cluster.start_node(name)
        states = ["sinfo", "-N", "--noheader", "--format=%t"]
        _wait_until(lambda: _output(states).split() == ["idle"] * num_nodes, folder)
        stack.callback(_cancel_everything)
        yield cluster


def _configure(folder: Path, names: list[str], num_cpus: int, max_array_size: int) -> Path:
    for name in ("state", *(f"spool.{name}" for name in names)):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    # munged wants its socket in a folder that all may enter, and that only its owner writes.
    folder.chmod(0o711)
    configuration = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    configuration.write_text(
        _CONFIGURATION.format(
            folder=folder,
            host=host,
            user=getpass.getuser(),
            controller_port=free_port(),
            nodes="\n".join(_NODE.format(name=name, host=host, port=free_port(), num_cpus=num_cpus) for name in names),
            max_array_size=max_array_size,
            first_job=1 + secrets.randbelow(9000),
        )
    )
    return configuration


def _munge_arguments(folder: Path) -> list[str]:
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    return ["--foreground", "--force", *(f"--{option}={folder / name}" for option, name in files.items())]


def _start(folder: Path, program: str, *arguments: str) -> subprocess.Popen[bytes]:
    path = shutil.which(program, path=_SEARCH_PATH)
    if path is None:
        raise RuntimeError(f"{program} is not installed: run .ci/packages.sh")
    with open(folder / f"{program}.out", "ab") as output:
        return subprocess.Popen([path, *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _cancel_everything() -> None:
    subprocess.run(["scancel", "--user", getpass.getuser()], check=False)
    deadline = time.monotonic() + 15
    while _output(["squeue", "--noheader"]).strip() and time.monotonic() < deadline:
        time.sleep(0.2)


def _wait_until(ready, folder: Path, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.[lo][ou][gt]")))
            raise RuntimeError(f"the SLURM cluster did not start\n{logs}")
        time.sleep(0.1)


def _output(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout


def _restore(configuration: str | None) -> None:
    os.environ.pop("SLURM_CONF", None)
    if configuration is not None:
        os.environ["SLURM_CONF"] = configuration


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with slurm_cluster():
        sys.exit(subprocess.run(sys.argv[1:], check=False).returncode)
