"""The report: its arithmetic, what it refuses to average, broken files, and today's tables; that
the benchmark runs; and that answers.py sets the simulator to D's states."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS))
import answers  # noqa: E402
import benchmark  # noqa: E402
import make_data  # noqa: E402
import report  # noqa: E402
from report import oap  # noqa: E402

CONFIG = {
    "scheme": "offline", "seed": 0, "steps": 20, "finetune_steps": 10, "eval_every": 1, "lr": 1.0,
    "budget": "inf", "dataset": "a.hdf5", "data_return": -43.85, "expert_return": None,
    "ref_min_score": -50.0, "ref_max_score": 0.0, "versions": {"commit": "abc"}}

def make_run(folder: Path, scores=None, **changed) -> Path:
    """A run folder; `scores` are its evaluations, NaN if there is none, and 20 of 50 by default."""
    folder.mkdir(parents=True)
    config = CONFIG | {"seed": int(folder.name)} | changed
    (folder / "config.json").write_text(json.dumps(config))
    scores = [50.0] * (20 + 10 * (config["scheme"] == "oap")) if scores is None else scores
    rows = pd.DataFrame({"step": range(1, 1 + len(scores)), "score": scores,
                         "return": -200.0 - np.arange(len(scores))})
    rows.to_csv(folder / "progress.csv", index=False)
    return folder

def make_report(root: Path, out: Path) -> str:
    report.main([str(root), "--out", str(out)])
    return (out / "report.md").read_text(encoding="utf-8")

def line(text: str, start: str, section: str = "") -> list[str]:
    """The cells of the first line of a table, behind a heading, that starts like this."""
    rows = text[text.index(section):].splitlines()
    return next(row for row in rows if row.startswith(f"| {start}")).split(" | ")[1:]

def test_a_cell_is_the_last_ten_evaluations_then_the_seeds_mean_and_deviation(tmp_path):
    runs = tmp_path / "runs"
    for seed, last in enumerate((30.0, 40.0, 56.0)):
        make_run(runs / "hopper-medium-v2/td3bc-offline" / str(seed), [999.0] * 10 + [last] * 10,
                 dataset=f"copy-{seed}.hdf5", versions={"commit": str(seed)})
        make_run(runs / "other/hopper-medium-v2/td3bc-offline" / str(seed))
    cells = line(make_report(runs, tmp_path / "out"), "hopper-medium-v2 (data: 12)")
    assert cells[0] == f"42.0 ± {np.std([30, 40, 56]):.1f} (3, 0.02k) [55.8 ± 1.2]"  # not 50
    assert "[82 ± 6.6]" in cells[4]  # the paper's, where there is no run
    for task in ("pen-human-v1", "pen-cloned-v1"):  # all of the paper's domain
        make_run(runs / "all" / task / "td3bc-oap/0", scheme="oap")
    text = make_report(runs, tmp_path / "out")
    assert line(text, "adroit average", "## all")[4].startswith("50.0 (1, 0.03k) [87.4 ± 12.2]")
    assert "gym average" not in text

def test_other_experiments_are_left_out_by_name_and_never_averaged(tmp_path, capsys):
    cell = tmp_path / "runs/hopper-medium-v2/td3bc-offline"
    make_run(cell / "0", [0.0] * 20, lr=9.0, scheme="oap")  # not finished: 30 updates are due
    make_run(cell / "1", [10.0] * 20)
    make_run(cell / "2", [20.0] * 20)
    make_run(cell / "3", [900.0] * 20, lr=2.0)
    make_run(cell / "10", [900.0] * 20, seed=2)
    make_run(cell.parent / "td3bc-offline-mine/0", [70.0] * 20, lr=3.0)
    text = make_report(tmp_path / "runs", tmp_path / "out")
    assert line(text, "hopper")[0].startswith("15.0 ± 5.0 (2, 0.02k)")
    assert line(text, "hopper", "### Tagged runs")[0].startswith("70.0 (1, 0.02k)")
    printed = capsys.readouterr().out
    for seed, why in ((0, "not finished, 20 of 30"), (3, "other settings than its neighbour: lr"),
                      (10, "its seed is also in 2")):
        assert f"- {cell / str(seed)}: {why}" in text and f"{cell / str(seed)}: {why}" in printed

def npz(**arrays) -> bytes:
    np.savez(content := io.BytesIO(), **arrays)
    return content.getvalue()

BROKEN = {  # file -> what may be in it; None if it is missing
    "config.json": [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, None, *(
        json.dumps(CONFIG | x).encode() for x in ({"steps": "many"}, {"expert_return": "x"}))],
    "progress.csv": [b"", b"step,score,return\n", b"step,score,return\n20,1,2", b"\0" * 99, None,
                     b"step,score,return\n20,1\n", b"step,score,return\n20,x,2\n", b"step\n20\n",
                     b"step,score,return\n20,1,2\n20,1,2\n", b"step,score,return\n20,,\n"],
    "audit.npz": [b"", b"PK\3\4half", b"text", *(npz(**x) for x in (
        {"divergence": np.zeros(3)}, {"divergence": np.zeros(3), "value_gain": np.zeros(4)},
        {"divergence": np.zeros(0), "value_gain": np.zeros(0)},
        {"divergence": np.array([{}]), "value_gain": np.zeros(1)}))],
}

def test_whatever_is_wrong_with_a_file_it_is_named_and_the_report_goes_on(tmp_path):
    runs, cases = tmp_path / "runs", [(name, x) for name, xs in BROKEN.items() for x in xs]
    make_run(runs / "hopper-medium-v2/td3bc-oap/0", scheme="oap")
    for i, (name, content) in enumerate(cases):
        path = make_run(runs / f"env{i}/td3bc-offline/0") / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    text = make_report(runs, tmp_path / "out")
    for i, (name, _) in enumerate(cases):
        assert f"- {runs}/env{i}/td3bc-offline/0: {name} can't be read" in text
        assert (f"| env{i} " in text) == (name == "audit.npz")  # whose run's scores count

def test_returns_are_shown_where_there_is_no_score(tmp_path):
    make_run(tmp_path / "runs/Mine-v0/td3bc-offline/0", [np.nan] * 20)
    assert line(make_report(tmp_path / "runs", tmp_path), "Mine")[0] == "-214.5 return (1, 0.02k)"

def test_nothing_to_report_is_one_line_and_exit_code_2(tmp_path, capsys):
    make_run(tmp_path / "unfinished/hopper-medium-v2/td3bc-offline/0", [1.0])
    (tmp_path / "empty").mkdir()
    for name in ("unfinished", "empty", "missing"):
        with pytest.raises(SystemExit) as stop:
            report.main([str(tmp_path / name), "--out", str(tmp_path / "out")])
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1) and name in err
    assert not (tmp_path / "out").exists()
    # -S: without any installed package.
    done = subprocess.run([sys.executable, "-S", RESULTS / "report.py", tmp_path],
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done

def test_every_figure_is_drawn_and_none_is_empty(tmp_path):
    runs = tmp_path / "runs"
    for seed in range(2):
        for label, more in (("offline", {}), ("o2o", {}), ("oap", {"expert_return": -5.0}), (
                "oap-weak", {"expert_return": -40.0, "tag": "weak"}), ("oap-ft", {"timing": "ft"})):
            folder = make_run(runs / f"hopper-medium-v2/td3bc-{label}/{seed}", scheme="oap",
                              scores=np.arange(30.0) + seed, **more)
        np.savez(folder / "audit.npz", divergence=np.arange(9.0), value_gain=np.ones(9))
    text = make_report(runs, tmp_path / "out")
    for name in (*(f"figure-{i}" for i in range(3, 8)), "hopper-medium-v2"):
        picture = matplotlib.image.imread(tmp_path / f"out/td3bc-{name}.png")
        assert picture[..., :3].std() > 0.05 and f"(td3bc-{name}.png)" in text
    found, _ = report.read_runs(runs)
    assert report.spread(found.groupby("label").score).loc["oap"].tolist() == [25, 0.5, 2]
    heights = [bar.get_height() for bar in report.figure_7(found)[0].axes[0].patches]
    assert heights == [25, 25, 25]  # o2o, oap-ft, oap
    assert not list(tmp_path.rglob("*.part"))

def test_a_closed_pipe_costs_nothing(tmp_path):
    make_run(tmp_path / "runs/Mine-v0/td3bc-offline/0")
    command = f"{sys.executable} {RESULTS}/report.py {tmp_path}/runs --out {tmp_path}/out"
    done = subprocess.run(["bash", "-c", f"exec {command} > >(exec true)"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and (tmp_path / "out/report.md").is_file()

def test_benchmark(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "ROWS", 60_000)
    benchmark.main(["--seconds", "0.1", "--device", "cpu"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert "less than" in first and lines[-1].startswith("215,500 steps of RankNet")
    assert [x.split(",")[0] for x in lines if "matmul " in x] == ["td3bc", "td3bc", "iql", "iql"]

PUBLISHED = """paper: td3bc
| halfcheetah-medium-v2, own data | 50.0 ± 0.5 |  |  | 51.6 ± 0.1 | 54.2 |
| hopper-medium-replay-v2, own data | 29.3 |  |  | 30.0 | 35.2 |
| halfcheetah-medium-v2, own data | 54.2 | 54.1 |  |
| hopper-medium-replay-v2, own data | 35.2 | 45.4 |  |
| halfcheetah-medium-v2, own data | 54.0 |
| hopper-medium-replay-v2, own data | 39.9 |

tenth: td3bc
| hopper-medium-replay-v2, own data | 26.7 ± 0.3 |  |  | 27.2 ± 0.3 | 32.0 ± 2.0 |
| hopper-medium-replay-v2, own data | 32.0 ± 2.0 | 34.9 ± 0.6 | 28.7 ± 0.6 |
| hopper-medium-replay-v2, own data | 29.4 ± 1.3 | 27.8 | 34.6 ± 0.0 |

gpu: td3bc
| hopper-medium-replay-v2, own data | 26.5 ± 0.7 |  |  | 26.4 ± 0.5 |  |
| hopper-medium-replay-v2, own data |  | 34.7 ± 0.6 |  |
| hopper-medium-replay-v2, own data | 30.1 ± 3.7 |

long: td3bc
| Hopper-v4-medium | 34.8 ± 0.2 |  |  |  | 34.3 ± 0.5 |

iql-2: iql
| pen-human-v1, own data | 56.8 ± 6.5 |  |  | 56.9 ± 7.9 | 47.2 ± 2.9 |

iql-control: iql
| pen-human-v1, own data | 63.2 |  |  |  |  |
| pen-human-v1, own data | 33.7 |

half: iql
| pen-human-v1, own data | 50.7 |  |  |  | 43.3 |

short: td3bc
| Walker2d-v4-medium | 32.6 ± 3.7 | 8.6 ± 3.3 | 31.6 ± 2.4 | 34.2 ± 3.3 | 32.6 ± 4.4 |
| Hopper-v4-medium-replay | 24.3 ± 0.7 | 23.6 ± 0.4 | 24.1 ± 0.7 | 24.5 ± 0.2 |

sac
| Walker2d-v4 | 75.4 [105] |"""

def test_the_committed_runs_give_the_published_tables(tmp_path):
    text = re.sub(r" \([^)]*\)", "", make_report(RESULTS / "runs", tmp_path))
    sections = dict(section.split("\n", 1) for section in text.split("\n## ")[1:])
    for name, *rows in map(str.splitlines, PUBLISHED.split("\n\n")):
        assert set(rows) <= set(sections[name].splitlines()), name
    assert text.count(": not finished, ") == 18

def test_answers_are_compared_with_the_simulator(tmp_path):
    env, other = (oap.make_env("hopper-medium-v2") for _ in range(2))
    data = make_data.collect("hopper-medium-v2", None, 60, seed=0)
    state, action = (data[k].astype(np.float32) for k in ("observations", "actions"))
    actor, _ = make_data.load_actor(str(oap.HERE / "experts" / "hopper-weak.pt"), env)
    value = answers.rollouts([env, other], state, action, actor, steps=1)
    np.testing.assert_allclose(value, data["rewards"], atol=1e-3)  # it began in these states
    actor.sample = lambda s: (torch.as_tensor(action[1:2]), None)  # what was done there
    value = answers.rollouts([env], state[:1], action[:1], actor, steps=2, discount=0.5)
    assert value.item() == pytest.approx(data["rewards"][0] + data["rewards"][1] / 2, abs=1e-3)

def test_answers_of_a_finished_run(tmp_path):
    task, file = "--env=hopper-medium-v2", tmp_path / "hopper.hdf5"
    make_data.make(make_data.parse_args([task, f"--out={file}", "--size=300"]))
    folder = oap.train(oap.parse_args([
        task, f"--dataset={file}", f"--out={tmp_path}", "--scheme=offline", "--steps=20",
        "--eval-every=20", "--eval-episodes=1"]))
    command = [sys.executable, RESULTS / "answers.py", f"--dataset={file}", "--repeats=1",
               "--samples=20", "--most=10", "--steps=5"]
    done = subprocess.run([*command, folder], capture_output=True, text=True)
    assert [re.sub(r"[-+\d., %±]+", " ", x).strip() for x in done.stdout.splitlines()[1:]] == [
        "of all of D answers for the policy; gain:", "ã as Q* says", "ã in the simulator",
        "π(s) in the simulator", "of the most divergent answers for the policy; gain:",
        "ã as Q* says", "ã in the simulator", "π(s) in the simulator"], done.stderr
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "no finished run" in done.stderr
