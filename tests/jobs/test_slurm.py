"""On a real SLURM of one node, which the fixture `cluster` starts; `.ci/packages.sh` installs what it needs."""

import subprocess

import pytest
from toy_runs import Toy, all_parts, wait_until

from megatron_tpt.errors import UserError
from megatron_tpt.jobs.slurm_tasks import _require_one_line, ranges


@pytest.fixture
def toy(tmp_path, cluster):
    return Toy(tmp_path)


def slurm(**scale):
    return {"executor": "slurm", "cpus_per_task": 1} | scale


def queue_is_empty():
    return not queue()


def queue(form="%i"):
    query = ["squeue", "--noheader", "--array", f"--format={form}"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout


def test_six_tasks_over_two_arrays_and_again_only_what_is_missing(toy):
    arguments = ["--fault", "fail", "--fault-task", 1, "--meet", 2]
    exit_code, printed = toy.run(*arguments, **slurm(num_tasks=6, wait=True))
    assert exit_code == 1, printed
    assert toy.parts() == [name for name in all_parts(6) if "00001" not in name]
    assert (toy.output / "part-00005.txt").read_text() == "part 5 of 6\n"
    assert toy.most_at_once() <= 2
    assert "task 1 failed with exit code 1" in printed and "the shelf is empty" in printed
    toy.fix()
    exit_code, printed = toy.run(*arguments, **slurm(num_tasks=6, wait=True))
    assert exit_code == 0, printed
    assert "submitted 1 of 6 tasks" in printed and "6 tasks: 6 finished" in printed
    assert sorted(toy.starts()) == [0, 1, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_tasks_killed_by_signal_or_by_slurm_stop_no_other_and_run_again(toy):
    arguments = ["--fault", "hang", "--fault-task", 1]
    exit_code, printed = toy.run(*arguments, **slurm(num_tasks=3))
    assert exit_code == 0 and "submitted 3 of 3 tasks" in printed
    toy.wait_for_starts(3)
    wait_until(lambda: len(queue().splitlines()) == 1)
    job = queue().split()[0]
    subprocess.run(["scancel", "--signal=KILL", "--full", job], check=True)
    wait_until(queue_is_empty)
    assert toy.parts() == ["part-00000.txt", "part-00002.txt"]
    toy.fix()
    exit_code, printed = toy.run(*arguments, **slurm(num_tasks=3, wait=True))
    assert exit_code == 0, printed
    assert sorted(toy.starts()) == [0, 1, 1, 2]


@pytest.mark.slow
def test_two_submissions_at_once_and_one_while_tasks_run_start_no_task_twice(toy):
    arguments = ["--seconds", 1]
    programs = [toy.start(*arguments, **slurm(num_tasks=4)) for _ in range(2)]
    printed = [program.communicate(timeout=60)[1] for program in programs]
    assert [program.returncode for program in programs] == [0, 0], printed
    assert sum("submitted 4 of 4 tasks" in each for each in printed) == 1
    toy.wait_for_starts(1)
    exit_code, again = toy.run(*arguments, **slurm(num_tasks=4, wait=True))
    assert exit_code == 0 and "waiting already" in again and "submitted" not in again
    assert sorted(toy.starts()) == [0, 1, 2, 3]
    assert toy.parts() == all_parts(4)


def test_another_split_is_refused_while_tasks_are_queued(toy):
    toy.run("--fault", "hang", "--fault-task", 0, **slurm(num_tasks=2))
    exit_code, printed = toy.run("--fault", "hang", "--fault-task", 0, **slurm(num_tasks=3))
    assert exit_code == 2 and "another command or number of tasks" in printed and "`scancel " in printed
    subprocess.run(["scancel", printed.rpartition("`scancel ")[2].partition("`")[0]], check=True)
    wait_until(queue_is_empty)


@pytest.mark.slow
def test_a_signal_queues_a_task_again_a_limited_number_of_times(toy):
    program = toy.start("--fault", "hang", "--fault-task", 0, **slurm(num_tasks=1, max_requeues=1, wait=True))
    for times in (1, 2):
        toy.wait_for_starts(times)
        subprocess.run(["scancel", "--signal=USR1", "--batch", queue().split()[0]], check=True)
    _, printed = program.communicate(timeout=60)
    assert program.returncode == 1
    assert toy.starts() == [0, 0]
    assert "met the time limit 2 times: raise time_limit, or max_requeues" in printed


@pytest.mark.slow
def test_a_task_is_queued_again_before_its_time_limit_and_completes(toy):
    # SLURM looks every 30 s which tasks have less time left than this, and does not count shorter limits than a minute.
    scale = slurm(num_tasks=1, time_limit="1", requeue_before_limit_s=55, wait=True)
    program = toy.start("--fault", "hang", "--fault-task", 0, **scale)
    toy.wait_for_starts(1)
    toy.fix()
    _, printed = program.communicate(timeout=120)
    assert program.returncode == 0, printed
    assert toy.starts() == [0, 0]
    assert "stopped by SIGUSR1" in (toy.output / "logs" / "task_00000.log").read_text()


def test_a_mistake_of_the_user_cancels_what_has_not_started(toy):
    scale = slurm(num_tasks=4, num_workers=1, wait=True)
    exit_code, printed = toy.run("--fault", "user_error", "--fault-task", 1, **scale)
    assert exit_code == 2
    assert printed.splitlines()[-1] == "error: task 1: the shelf has no name: give it one"
    assert toy.starts() == [0, 1]
    assert "1 finished, 1 failed, 2 not run" in printed


def test_what_slurm_refuses_is_reported_in_its_words(toy):
    exit_code, printed = toy.run(**slurm(partition="nowhere"))
    assert exit_code == 2
    assert "error: SLURM refused: sbatch: error: invalid partition specified: nowhere" in printed


def test_options_reach_sbatch_and_the_shell_line_runs_before_each_task(toy):
    scale = slurm(
        num_tasks=1, mem="100M", sbatch_args=["comment=two words"], env_command="export CUDA_VISIBLE_DEVICES=7"
    )
    exit_code, printed = toy.run("--fault", "hang", "--fault-task", 0, **scale)
    assert exit_code == 0, printed
    toy.wait_for_starts(1)
    assert queue("%k|%m").strip() == "two words|100M"
    assert toy.notes()[0]["gpus"] == "7"
    subprocess.run(["scancel", queue("%i").strip()], check=True)
    wait_until(queue_is_empty)


@pytest.mark.parametrize("word", ["a\ntouch x\n#", "--partition=x\r", "tab\there", "\x1b]0;title\x07", "\x7f"])
def test_words_that_would_end_a_line_of_the_job_script_are_refused(word):
    _require_one_line(["a b $(x) 'q' \"d\"", "Straße"])
    with pytest.raises(UserError, match="line break or another control character"):
        _require_one_line(["python", word])


def test_a_job_in_a_folder_with_a_line_break_in_its_name_is_not_submitted(tmp_path, cluster):
    toy = Toy(tmp_path / "n\ntouch PWN\n#")
    exit_code, printed = toy.run(**slurm(num_tasks=1))
    assert exit_code == 2 and "line break" in printed
    assert not list(tmp_path.rglob("tasks_*.sh"))


def test_a_folder_with_a_percent_sign_gets_its_logs(tmp_path, cluster):
    folder = tmp_path / "50%a 'b' $(c)"
    folder.mkdir()
    toy = Toy(folder)
    exit_code, printed = toy.run(**slurm(num_tasks=1, wait=True))
    assert exit_code == 0, printed
    assert list(folder.rglob("slurm/*_0.out"))


def test_indices_are_written_as_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
