"""The variables of launchers: taken over when complete, refused when not, and left alone where nothing was launched."""

import pytest

from megatron_tpt.errors import UserError
from megatron_tpt.training.launchers import first_host, join_launcher

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-here-99@1",
}
MPIEXEC = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_PORT": "29501"}


def joined(environment: dict[str, str]) -> list[str | None]:
    result = dict(environment)
    join_launcher(result)
    return [result.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SRUN, ["3", "4", "1", "gpu07"]),
        (SRUN | {"MASTER_ADDR": "10.0.0.1"}, ["3", "4", "1", "10.0.0.1"]),
        (MPIRUN, ["1", "2", "1", "127.0.0.1"]),
        (MPIRUN | BATCH, ["1", "2", "1", "127.0.0.1"]),
        (MPIEXEC, ["1", "2", "1", "127.0.0.1"]),
        (SRUN | {"PMI_SIZE": "4", "PMI_RANK": "3"}, ["3", "4", "1", "gpu07"]),  # srun --mpi=pmi2
        (MPIEXEC | SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, ["1", "2", "1", "127.0.0.1"]),  # mpiexec started by srun
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"} | SRUN, ["0", "2", None, "a"]),
    ],
)
def test_complete_variables_are_taken_over(environment: dict[str, str], expected: list[str]) -> None:
    assert joined(environment) == expected


def test_all_processes_of_a_launch_meet_at_one_port_and_another_launch_at_another() -> None:
    def port(environment: dict[str, str]) -> int:
        result = dict(environment)
        join_launcher(result)
        return int(result["MASTER_PORT"])

    assert 1024 < port(SRUN) == port(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) < 65536
    assert len({port(SRUN), port(SRUN | {"SLURM_STEP_ID": "2"}), port(SRUN | {"SLURM_RESTART_COUNT": "1"})}) == 3
    assert port(MPIRUN) != port(MPIRUN | {"PMIX_NAMESPACE": "prterun-here-100@1"})


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun .* LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "do not say MASTER_ADDR:"),  # two machines
        ({"PMI_SIZE": "8", "PMI_RANK": "0"}, "mpiexec has started this process as one of 8"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "srun .* LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (BATCH | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, "srun .* MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0"}, "RANK is set without WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set without RANK"),
    ],
)
def test_incomplete_variables_are_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        joined(environment)
    assert "torchrun" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH,  # a batch script's own shell
        BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # the interactive step of salloc
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # a shell of salloc on the login node
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_a_process_that_nothing_has_launched_trains_alone(
    environment: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert joined(environment) == [None, None, None, None]
    assert ("this SLURM job has 4 tasks" in capsys.readouterr().out) == ("SLURM_NTASKS" in environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("a,b", "a"),
        ("gpu[07-08,12],cpu1", "gpu07"),
        ("rack[1-2]n[03,07-09].site,other", "rack1n03.site"),
    ],
)
def test_the_first_host_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
