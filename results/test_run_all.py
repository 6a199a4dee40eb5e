"""Tests of run_all.sh: python -m pytest -q results."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import oap  # noqa: E402

RUN_ALL = Path(oap.__file__).with_name("run_all.sh")
STUB = """#!/usr/bin/env bash
echo "$CUDA_VISIBLE_DEVICES|$OMP_NUM_THREADS|$*" >> "$CALLS"
case "$*" in
  *"--seed 1"*) echo "oap.py: bad" >&2; exit 2 ;;
  *"--seed 2"*) echo "oap.py: another process trains in runs/x" >&2; exit 2 ;;
  *"--seed 7"*) mkfifo "$CALLS.fifo"; echo > "$CALLS.fifo" ;;  # until seed 8 runs too
  *"--seed 8"*) until [ -p "$CALLS.fifo" ]; do sleep 0.01; done; read -r < "$CALLS.fifo" ;;
  *"--seed 9"*) exec sleep 60 ;;
esac
"""

@pytest.fixture
def run_all(tmp_path):
    """Starts run_all.sh in an empty folder. `python` is a stub that notes how it was called."""
    (folder := tmp_path / "a folder").mkdir()
    (folder / "python").write_text(STUB)
    (folder / "python").chmod(0o755)
    clean = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls"),
             "CUDA_VISIBLE_DEVICES": "", "TASKS": "pen-human-v1", "SCHEMES": "oap"}

    def start(*args, script=RUN_ALL, **env):
        return subprocess.Popen(
            ["bash", script, *args], cwd=folder, env=clean | env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,  # a background job ignores Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    start.calls = folder / "calls"
    return start

def test_run_all_shares_the_papers_runs_among_array_tasks(run_all):
    shares = [run_all("--tag", "a b", DRY_RUN="1", TASKS="", SCHEMES="", ALGOS="td3bc iql",
                      SLURM_ARRAY_TASK_COUNT="3", SLURM_ARRAY_TASK_ID=str(i),
                      SLURM_ARRAY_TASK_MIN="2", SLURM_ARRAY_TASK_STEP="4") for i in (2, 6, 10)]
    lines = [share.communicate()[0].splitlines() for share in shares]
    runs = [tuple(shlex.split(line)) for line in itertools.chain(*lines)]
    assert list(map(len, lines)) == [334, 333, 333] and len(set(runs)) == 20 * 5 * 2 * 5
    assert {run[10:] for run in runs} == {("--tag", "a b")}  # the user has the last word
    assert {run[7] for run in runs} == set(oap.SCHEMES) and not run_all.calls.exists()
    for task in {run[3] for run in runs}:
        assert oap.find_robot(task) in oap.ROBOTS

def test_run_all_names_failed_runs_at_the_end_and_those_of_other_processes(run_all, tmp_path):
    copy = tmp_path / "slurm_script"  # where sbatch puts one
    copy.write_bytes(RUN_ALL.read_bytes())
    first = run_all(script=copy, SLURM_SUBMIT_DIR=str(RUN_ALL.parent), SEEDS="1 0 2 3")
    run = "--env pen-human-v1 --algo td3bc --scheme oap --seed"
    assert first.communicate()[0].splitlines()[-2:] == [
        f"failed: {run} 1", f"another process has: {run} 2"] and first.returncode == 1
    assert [call[-1] for call in run_all.calls.read_text().splitlines()] == list("1023")
    for seeds, code, last in (("0 3", 0, ""), ("0 2", 0, f"another process has: {run} 2\n")):
        again = run_all(SEEDS=seeds)
        assert again.communicate()[0].endswith(last) and again.returncode == code
    assert run_all(script=copy).wait() == 2  # no oap.py

def test_run_all_runs_jobs_side_by_side_and_spreads_them_over_gpus(run_all):
    both = run_all(JOBS="2", CUDA_VISIBLE_DEVICES="4,GPU-5", SEEDS="7 8")
    assert both.wait(60) == 0  # seed 7 waits for seed 8
    assert {tuple(call.split("|")[:2]) for call in run_all.calls.read_text().splitlines()} == {
        ("4", "1"), ("GPU-5", "1")}
    assert run_all(GPUS="6", JOBS="1", SEEDS="0").wait() == 0
    assert run_all.calls.read_text().splitlines()[-1].startswith("6||")

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_all_stops_what_it_started(run_all, number):
    script = run_all(JOBS="2", SEEDS="9 9 9")
    while not run_all.calls.exists() or run_all.calls.read_text().count("\n") < 2:
        time.sleep(0.01)
    script.send_signal(number)
    # The output ends when no child holds it any more.
    assert script.communicate(timeout=30)[0].endswith("stopped; the same command goes on\n")
    assert script.returncode == 130 and run_all.calls.read_text().count("\n") == 2
