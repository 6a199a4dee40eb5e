"""The paper's tables and figures from run folders.

    python results/report.py runs                  # writes runs/report/report.md and its pictures
    python results/report.py results/runs --out /tmp/report

A run is a folder <collection>/<env>/<algo>-<label>/<seed> with config.json and progress.csv, and is
named by it. Each collection, the path between RUNS and <env>, is an experiment of its own.
"""

import argparse
import io
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
try:
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd

    import oap
except ImportError as error:
    print(f"{error}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

RESULTS = Path(__file__).resolve().parent
RULES = """A cell is the mean ± standard deviation (divisor n) over seeds (how many, updates), in
brackets the paper's. A seed's score is the mean of its last 10 evaluations; a trained black box's
is that of the policy that was kept, if it was measured. Tasks without reference returns show
returns."""
TABLES = {
    "Table 2: training schemes": [*oap.SCHEMES],
    "Table 3: RankNet": ["oap", "oap-inf", "oap-no-ranknet"],
    "Table 4: black boxes": ["expert"],
    "Figure 7: timing": ["o2o", "o2o-interval", "oap-ft", "oap"],
}
COLORS = {  # Okabe and Ito's, which colour-blind readers can tell apart; also the labels' order
    "offline": "#000000", "online": "#CC79A7", "online-mix": "#009E73", "o2o": "#E69F00",
    "o2o-interval": "#CC79A7", "oap-ft": "#009E73", "oap-no-ranknet": "#D55E00",
    "oap-inf": "#56B4E9", "oap": "#0072B2", "expert": "#000000",
}
FREE = {*oap.MAY_CHANGE, "seed", "audit"}  # what seeds of a folder may differ in

def domain(task: str) -> str:
    return oap.find_robot(task).domain

def column(label: str) -> str:
    """The column of the paper that a label belongs to: "oap-ft-mytag" -> "oap-ft"."""
    return max((c for c in COLORS if f"{label}-".startswith(f"{c}-")), key=len, default="")

def ordered(labels) -> list[str]:
    return sorted(set(labels), key=lambda x: ([*COLORS, ""].index(column(x)), x))

def spread(groups) -> pd.DataFrame:
    return groups.agg(mean="mean", std=lambda x: x.std(ddof=0), n="count")

def read_run(folder: Path) -> dict:
    """A row of the table of runs. Raises BadInput, whatever is wrong with the run's files."""
    with oap.blame("config.json can't be read"):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        low, high = (config.get(f"ref_{k}_score", np.nan) for k in ("min", "max"))
        data, box = (100 * ((np.nan if config.get(k) is None else config[k]) - low) / (high - low)
                     for k in ("data_return", "expert_return"))
        updates = config["steps"] + config["finetune_steps"] * (config["scheme"] in ("o2o", "oap"))
        due = updates - config["eval_every"]  # rows come at its multiples alone
        run = {"seed": int(config["seed"]), "data": data, "box": box,
               "commit": str(config["versions"].get("commit") or "unknown"),
               "settings": {k: json.dumps(float(v) if type(v) is int else v)
                            for k, v in config.items() if k not in FREE}}
        run["recipe"] = str(sorted(  # but for the name and the black box
            x for x in run["settings"].items() if x[0] != "tag" and not x[0].startswith("expert")))
    with oap.blame("progress.csv can't be read"):
        text = (folder / "progress.csv").read_text("utf-8")
        rows = pd.read_csv(io.StringIO(text), index_col=False)
        rows = rows[["step", "score", "return"]].astype(float)
        oap.check(text.endswith("\n") and len(rows), "no row yet, or half a row")
        oap.check(rows.step.is_monotonic_increasing and rows.step.is_unique
                  and np.isfinite(rows["return"]).all(), "a wrong step or return")
        oap.check(np.isfinite(rows.score).nunique() == 1, "only some scores are numbers")
    step, (score, value) = rows.step.iloc[-1], rows[["score", "return"]].to_numpy()[-10:].mean(0)
    oap.check(step > due, f"not finished, {step:,.0f} of {updates:,} updates")
    score = box if config["scheme"] == "expert" and np.isfinite(box) else score
    task, name = Path(os.path.abspath(folder)).parts[-3:-1]
    if digest := config.get("dataset_sha256"):
        known = [file for file, x in oap.checksums().items() if x == digest]
        if not known or known[0] != Path(oap.d4rl_infos(task)[0]).name:
            task += ", own data"  # which no published figure belongs beside
    algo, _, label = name.partition("-")
    return run | {"task": task, "algo": algo, "label": label, "rows": rows, "step": step,
                  "normalised": np.isfinite(score), "score": score if np.isfinite(score) else value}

def read_audit(path: Path) -> np.ndarray:
    """Figure 6's divergences and value gains, (2, n)."""
    with oap.blame("audit.npz can't be read"), np.load(path) as arrays:
        points = np.stack([arrays["divergence"], arrays["value_gain"]]).astype(float)
        oap.check(points.ndim == 2 and points.size, f"it has no two lists, but {points.shape}")
        return points

def read_runs(root: Path) -> tuple[pd.DataFrame, list[str]]:
    """A row for each finished run, and a line for each run or file that was left out, and why.

    Different experiments are never averaged: a seed with other settings than the first finished one
    of its folder is left out, and so is a seed that is there twice.
    """
    runs, left_out, first = [], [], {}
    folders = {p.parent for name in ("config.json", "progress.csv") for p in root.rglob(name)}
    for folder in sorted(folders, key=lambda f: (f.parent, len(f.name), f.name)):
        try:
            run = read_run(folder) | {"collection": "/".join(folder.relative_to(root).parts[:-3])}
            new, audit = run["settings"], folder / "audit.npz"
            seeds, old = first.setdefault(folder.parent, ({}, new))
            changed = [k for k in new | old if new.get(k) != old.get(k)]
            oap.check(not changed, f"other settings than its neighbour: {', '.join(changed)}")
            oap.check(run["seed"] not in seeds, f"its seed is also in {seeds.get(run['seed'])}")
            seeds[run["seed"]] = folder.name
            runs.append(run | {"audit": None})
            runs[-1]["audit"] = read_audit(audit) if audit.exists() else None
        except oap.BadInput as error:  # of audit.npz: the scores still count
            left_out.append(f"{folder}: {error}")
    return pd.DataFrame(runs), left_out

def averages(runs: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """A row for each label and seed that has all of the paper's tasks of a domain, or of all."""
    members, found = paper[(paper.table == 2) & ~paper.task.str.contains("average")].task, []
    for name in ("gym average", "antmaze average", "adroit average", "average"):
        tasks = [x for x in members.unique() if f"{domain(x)} average".endswith(name)]
        whole = runs[runs.task.isin(tasks)].groupby(["label", "seed"]).filter(
            lambda x: len(x) == len(tasks))  # noqa: B023
        found.append(whole.groupby(["label", "seed"], as_index=False).agg(
            {"score": "mean", "step": "min", "normalised": "min"}).assign(task=name))
    return pd.concat(found)

def table(runs: pd.DataFrame, labels: list[str], paper: pd.DataFrame) -> str:
    """Tasks x labels in Markdown."""
    theirs = {(p.task, p.column): f" [{p.mean:g}" + (f" ± {p.std:g}]" if p.std >= 0 else "]")
              for p in paper[paper.algo == runs.algo.iloc[0]].itertuples(index=False)}
    runs, lines = pd.concat([runs, averages(runs, paper)]), [["task", *labels]]
    lines.append(["---"] * len(lines[0]))
    for task in sorted(runs.task.unique(), key=lambda x: ([*paper.task, x].index(x), x)):
        same = runs[runs.task == task]
        data = "/".join(sorted({f"{x:.0f}" for x in same.data.dropna()}))
        robot = task.lower().partition("-")[0].removeprefix("adroithand")  # Table 4's tasks
        lines.append([f"{task} (data: {data})" if data else task])
        for label in labels:
            own, cell = same[same.label == label], ""
            if len(own):
                std = f" ± {own.score.std(ddof=0):.1f}" if len(own) > 1 else ""
                unit, step = "" if own.normalised.all() else " return", own.step.min() / 1000
                cell = f"{own.score.mean():.1f}{std}{unit} ({len(own)}, {step:,g}k)"
            if cell or label in COLORS:
                key = robot if column(label) == "expert" else task
                cell += theirs.get((key, column(label)), "")
            lines[-1].append(cell.strip())
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def tables(runs: pd.DataFrame, paper: pd.DataFrame) -> list[str]:
    """The paper's tables, as far as there are runs for them, and one of the other labels."""
    text = []
    for title, labels in {**TABLES, "Tagged runs": ordered({*runs.label} - {*COLORS})}.items():
        # Table 3 and Figure 7 repeat Table 2's columns, which alone do not make a table.
        needed = [x for x in labels if x not in oap.SCHEMES] or labels
        chosen = runs[runs.task.isin(runs[runs.label.isin(needed)].task) & runs.label.isin(labels)]
        if len(chosen):
            text += [f"### {title}", table(chosen, labels, paper)]
    return text

def panels(items: list[tuple], draw: Callable, caption: str) -> tuple | None:
    """A figure, three panels in a row, each drawn by draw(ax, *item), and its caption."""
    if not items:
        return None
    across, down = min(len(items), 3), -(-len(items) // 3)
    figure, axes = plt.subplots(down, across, squeeze=False, layout="constrained",
                                figsize=(4.8 * across, 3.9 * down))
    for ax, item in zip(axes.flat, items):
        draw(ax, *item)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize="small")
    for ax in axes.flat[len(items):]:
        ax.remove()
    return figure, caption

def bars(ax: plt.Axes, title: str, shown: pd.DataFrame) -> None:
    """`shown` has a row a bar: mean, std and n; what has no n is not of this project."""
    colors = [COLORS.get(name.split()[-1], "#BBBBBB") for name in shown.index]
    ax.bar(range(len(shown)), shown["mean"], yerr=shown["std"], capsize=3, color=colors)
    names = [f"{name} (n={n:.0f})" if n > 0 else name for name, n in shown.n.items()]
    ax.set_xticks(range(len(shown)), names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set(title=title, ylabel="normalised score")

def aggregates(scores: np.ndarray) -> np.ndarray:
    """Median, interquartile mean, mean and optimality gap (..., 4) of scores (..., seeds, tasks).

    As Agarwal et al. (2021, "Deep RL at the Edge of the Statistical Precipice") define them.
    """
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), -1)
    quarter = flat.shape[-1] // 4
    middle = flat[..., quarter : flat.shape[-1] - quarter]
    return np.stack([np.median(scores.mean(-2), -1), middle.mean(-1), flat.mean(-1),
                     1 - np.minimum(flat, 1).mean(-1)], -1)

def figure_3(runs: pd.DataFrame) -> tuple | None:
    """Four aggregates over the tasks that every scheme has run, with bootstrap intervals."""
    runs = runs[runs.label.isin(oap.SCHEMES)]
    grid = runs.pivot(index=["label", "seed"], columns="task", values="score") / 100
    grid = grid.loc[:, grid.notna().groupby("label").any().all()].dropna()
    scores = {f"{x} (n={len(grid.loc[x])})": grid.loc[x].to_numpy()
              for x in ordered(grid.index.get_level_values("label"))}
    if grid.empty or len(scores) < 2 or min(map(len, scores.values())) < 2:
        return None  # of one seed, an interval would have no width
    names, points, intervals = ("median", "IQM", "mean", "optimality gap"), {}, {}
    for label, x in scores.items():  # seeds are drawn anew for each task: the tasks are strata
        drawn = np.random.default_rng(0).integers(len(x), size=(2000, *x.shape))
        points[label] = aggregates(x)
        intervals[label] = np.percentile(aggregates(np.take_along_axis(x[None], drawn, 1)), (
            2.5, 97.5), axis=0)
    figure, axes = plt.subplots(1, len(names), sharey=True, layout="constrained",
                                figsize=(11, 1.2 + 0.35 * len(scores)))
    for i, (ax, name) in enumerate(zip(axes, names)):
        for label in scores:
            (low, high), color = intervals[label][:, i], COLORS[label.partition(" ")[0]]
            ax.barh(label, high - low, 0.6, low, color=color, alpha=0.4)
            ax.plot(points[label][i], label, "|", color=color, ms=14, mew=2)
        ax.set_title(name)
        ax.use_sticky_edges = False  # a margin beside the bars
        ax.locator_params(axis="x", nbins=4)
    axes[0].invert_yaxis()
    figure.supxlabel("normalised score / 100", fontsize="medium")
    return figure, f"Figure 3: 95 % stratified bootstrap intervals over {', '.join(grid.columns)}"

def figure_4(runs: pd.DataFrame) -> tuple | None:
    """Other algorithms' published figures beside ours, over the tasks that all of them have."""
    published = pd.read_csv(RESULTS / "published.csv")
    runs = runs[runs.label.isin(["offline", "o2o", "oap"]) & runs.task.isin(published.task)]
    labels = ordered(runs.label)
    runs, items = runs.groupby("task").filter(lambda x: x.label.nunique() == len(labels)), []
    for name, same in runs.groupby(runs.task.map(domain)):
        theirs = published[published.task.isin(same.task)].groupby("algo", sort=False)[["mean"]]
        ours = spread(same.groupby(["label", "seed"]).score.mean().groupby("label")).loc[labels]
        items.append((name, pd.concat([theirs.mean(), ours.rename("our {}".format)])))
    return panels(items, bars, f"Figure 4: means over {', '.join(sorted(set(runs.task)))}, and"
                  f" deviation over seeds; grey: {', '.join(published.source.unique())}")

def figure_5(runs: pd.DataFrame) -> tuple | None:
    """OAP's score against its black box's, for tasks that were run with several black boxes."""
    items, asking = [], runs[(runs.label.map(column) == "oap") & runs.box.notna()]
    for (task, _), same in asking.groupby(["task", "recipe"]):
        labels = same.sort_values("label").drop_duplicates("box").label  # "oap" before "oap-tag"
        if len(labels) > 1:
            items.append((task, spread(same[same.label.isin(labels)].groupby("box").score)))

    def draw(ax: plt.Axes, task: str, shown: pd.DataFrame) -> None:
        ax.errorbar(shown.index, shown["mean"], shown["std"], marker="o", capsize=3,
                    color=COLORS["oap"], label=f"oap (n={shown.n.min()})")
        plain = runs[(runs.task == task) & runs.label.isin(["offline", "o2o"])]
        for label, mean, std, n in spread(plain.groupby("label").score).itertuples():
            ax.axhline(mean, color=COLORS[label], linestyle="--", label=f"{label} (n={n})")
            ax.axhspan(mean - std, mean + std, color=COLORS[label], alpha=0.1, linewidth=0)
        ax.set(title=task, xlabel="normalised score of the black box", ylabel="normalised score")

    return panels(items, draw, "Figure 5: mean and standard deviation over seeds")

def figure_6(runs: pd.DataFrame) -> tuple | None:
    """Divergence against value gain: the first audited run of each label."""
    def draw(ax: plt.Axes, run: pd.Series) -> None:
        ax.scatter(*run.audit, s=4, alpha=0.3, edgecolors="none", color=COLORS["oap"])
        ax.axhline(0, color="#999999", linewidth=0.8)
        ax.set(title=f"{run.task}\n{run.label}, seed {run.seed}", xlabel="divergence (π(s) - a)²",
               ylabel="value gain (return)")

    audits = runs[runs.audit.notna()].drop_duplicates(["task", "label"])
    return panels([(run,) for _, run in audits.iterrows()], draw,
                  "Figure 6: Q*(s, π(s)) - Q*(s, a) of samples spread over D")

def figure_7(runs: pd.DataFrame) -> tuple | None:
    """The four ways to time interactions and queries, a panel a task."""
    runs = runs[runs.label.isin(TABLES["Figure 7: timing"])]
    shown = {task: spread(same.groupby("label").score) for task, same in runs.groupby("task")}
    return panels([(task, x.loc[ordered(x.index)]) for task, x in shown.items()
                   if not {*x.index} <= {*oap.SCHEMES}], bars,
                  "Figure 7: mean and standard deviation over seeds")

def curves(runs: pd.DataFrame) -> tuple:
    """A task's learning curves, in one panel if they are few. Each ends at the table's number."""
    unit, name = ("score", "normalised score") if runs.normalised.all() else ("return", "return")

    def draw(ax: plt.Axes, kind: str, some: pd.DataFrame) -> None:
        used = {COLORS.get(label) for label in some.label}
        free = itertools.cycle(c for c in dict.fromkeys(COLORS.values()) if c not in used)
        for i, label in enumerate(ordered(some.label)):
            seeds = [x.set_index("step")[unit].rolling(10, min_periods=1).mean()
                     for x in some[some.label == label].rows]
            shown = spread(pd.concat(seeds).groupby("step"))
            step, color = shown.index / 1000, COLORS.get(label) or next(free)
            ax.plot(step, shown["mean"], ("-", "--", "-.", ":")[i % 4], color=color,
                    marker="o" if len(step) == 1 else "", label=f"{label} (n={len(seeds)})")
            ax.fill_between(step, shown["mean"] - shown["std"], shown["mean"] + shown["std"],
                            color=color, alpha=0.15, linewidth=0)
        ax.sharey(ax.figure.axes[0])
        ax.set(title=f"{runs.task.iloc[0]}{kind}", xlabel="updates (thousands)", ylabel=name)

    kinds = runs.label.map(lambda x: "\nschemes" if x in (*oap.SCHEMES, "expert") else
                           "\nvariants" if x in COLORS else "\ntagged")
    if runs.label.nunique() <= 6:
        kinds[:] = ""
    return panels([*runs.groupby(kinds)], draw,
                  "Rolling means of ten evaluations; mean and standard deviation over seeds")

def report(root: Path, out: Path) -> str:
    """Writes report.md and its pictures to `out`; returns what was done, in lines."""
    runs, left_out = read_runs(root)
    oap.check(len(runs), "; ".join([f"{root} has no finished run", *left_out]))
    paper, text = pd.read_csv(RESULTS / "paper.csv"), [f"# {root}", RULES]
    for (collection, algo), group in runs.groupby(["collection", "algo"]):
        text += [f"## {f'{collection}: ' if collection else ''}{algo}",
                 f"Made by oap.py of commit {', '.join(sorted(set(group.commit)))}.",
                 *tables(group, paper)]
        figures = {f"figure-{i}": draw(group[group.normalised]) for i, draw in (
            (3, figure_3), (4, figure_4), (5, figure_5), (7, figure_7))}
        figures |= {"figure-6": figure_6(group)}
        figures |= {task: curves(same) for task, same in group.groupby("task")}
        for name, (figure, caption) in ((k, v) for k, v in figures.items() if v):
            path = Path(collection, f"{algo}-{name}.png")
            figure.savefig(picture := io.BytesIO(), dpi=130)
            plt.close(figure)
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            oap.write(out / path, picture.getvalue())
            text.append(f"![{algo} {name}]({quote(path.as_posix())})\n\n*{caption}*")
    text += ["## Left out", "\n".join(f"- {x}" for x in left_out)] if left_out else []
    oap.write(out / "report.md", ("\n\n".join(text) + "\n").encode())
    return "\n".join([f"{out / 'report.md'}: {len(runs)} runs",
                      *(f"left out: {line}" for line in left_out)])

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="a folder with run folders somewhere below it")
    parser.add_argument("--out", type=Path, default=Path("runs", "report"),
                        help="where report.md and its pictures go (default: runs/report)")
    args = parser.parse_args(argv)
    plt.switch_backend("Agg")
    try:
        print(report(args.runs, args.out), flush=True)
    except BrokenPipeError:  # nobody reads the lines; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (oap.BadInput, OSError) as error:
        parser.exit(2, f"{' '.join(str(error).split())}\n")

if __name__ == "__main__":
    main()
