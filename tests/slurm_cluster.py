"""A real SLURM cluster of one node on this machine, for tests: munged, slurmctld, slurmd and their own configuration.

python tests/slurm_cluster.py COMMAND ...     # runs the command with sbatch, squeue ... talking to that cluster

Needs the programs of Debian's slurm-wlm and munge (`.ci/packages.sh` installs them), but no service that is set up or
running: keys, sockets, ports, logs and state are all in one temporary folder. It runs as root or as any user, whose
jobs then run as that user. Tasks share the node; there is no accounting database and nothing needs cgroups.
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
from pathlib import Path

from ports import free_port

PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo"]
_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
# A requeued task starts again once its credential has expired; 5 s is the least.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
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
MinJobAge=300
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={num_cpus} CoresPerSocket={num_cpus} RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing_programs() -> list[str]:
    """The programs that a cluster needs and that are not on this machine."""
    return [name for name in PROGRAMS if shutil.which(name, path=_SEARCH_PATH) is None]


@contextlib.contextmanager
def slurm_cluster(*, num_cpus: int = 2, max_array_size: int = 1001) -> Iterator[Path]:
    """Start the cluster, yield its folder (logs, `slurm.conf`), stop it with all its jobs.

    The programs find it by the environment variable SLURM_CONF, which is set meanwhile.
    """
    # A socket's path is limited to about 100 characters: TMPDIR may be deep.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    before = os.environ.get("SLURM_CONF")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        configuration = _configure(folder, num_cpus, max_array_size)
        stack.enter_context(_daemon(folder, "munged", *_munge_arguments(folder)))
        _wait_until(lambda: (folder / "munge.socket").exists(), folder)
        os.environ["SLURM_CONF"] = str(configuration)
        stack.callback(_restore, before)
        stack.enter_context(_daemon(folder, "slurmctld", "-D", "-c", "-i"))
        stack.enter_context(_daemon(folder, "slurmd", "-D", "-c"))
        _wait_until(lambda: "idle" in _output(["sinfo", "--noheader", "--format=%t"]), folder)
        stack.callback(_cancel_everything)
        yield folder


def _configure(folder: Path, num_cpus: int, max_array_size: int) -> Path:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o400)
    # munged wants its socket in a folder that all may enter, and that only its owner writes.
    folder.chmod(0o711)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            controller_port=free_port(),
            node_port=free_port(),
            num_cpus=num_cpus,
            max_array_size=max_array_size,
            first_job=1 + secrets.randbelow(9000),
        )
    )
    return configuration


def _munge_arguments(folder: Path) -> list[str]:
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    return ["--foreground", "--force", *(f"--{option}={folder / name}" for option, name in files.items())]


@contextlib.contextmanager
def _daemon(folder: Path, program: str, *arguments: str) -> Iterator[None]:
    path = shutil.which(program, path=_SEARCH_PATH)
    if path is None:
        raise RuntimeError(f"{program} is not installed: run .ci/packages.sh")
    with open(folder / f"{program}.out", "wb") as output:
        process = subprocess.Popen([path, *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield
    finally:
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


def _wait_until(ready, folder: Path, timeout_s: float = 30) -> None:
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
