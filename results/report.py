"""The paper's tables and figures from run folders.

    python results/report.py runs                  # writes runs/report/report.md and its pictures
    python results/report.py results/runs --out /tmp/report

A run is a folder <collection>/<env>/<algo>-<label>/<seed> with config.json and progress.csv, and is
named by it. Each collection, the path between RUNS and <env>, is an experiment of its own.
"""

import argparse
import io
import json
import math
import os
import sys
import warnings
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
try:
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd
    from rliable import library, metrics

    import oap
except ImportError as error:
    print(f"{error}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

RESULTS = Path(__file__).resolve().parent
RULES = """A cell is the mean ± standard deviation over seeds (how many, updates), in brackets the
paper's. A seed's score is the mean of its last 10 evaluations; a trained black box's is that of
the policy that was kept, if it was measured. Tasks without reference returns show returns."""
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
        low, high = (config.get(f"ref_{k}_score", math.nan) for k in ("min", "max"))
        data, box = (math.nan if config.get(f"{k}_return") is None else
                     100 * (config[f"{k}_return"] - low) / (high - low) for k in ("data", "expert"))
        updates = config["steps"] + config["finetune_steps"] * (config["scheme"] in ("o2o", "oap"))
        # Seeds of a folder may differ in these; an audit only measures.
        free = {*oap.FREE, "seed", "audit"}
        run = {"seed": int(config["seed"]), "data": data, "box": box,
               "commit": config.get("versions", {}).get("commit") or "unknown",
               "settings": {k: json.dumps(v) for k, v in config.items() if k not in free}}
        due = updates - config["eval_every"]  # rows come at its multiples alone
    with oap.blame("progress.csv can't be read"):
        text = (folder / "progress.csv").read_text("utf-8")
        rows = pd.read_csv(io.StringIO(text), index_col=False)
        rows = rows[["step", "score", "return"]].astype(float)
        oap.check(text.endswith("\n") and len(rows) > 0, "no row yet, or half a row")
        oap.check(np.isfinite(rows[["step", "return"]]).all(None) and rows.step.diff()[1:].gt(0).all(),
                  "steps that don't increase, or a return that is not finite")
    oap.check(rows.step.iloc[-1] > due, f"not finished, {rows.step.iloc[-1]:,.0f} of {updates:,} updates")
    score, value = rows[["score", "return"]].to_numpy()[-10:].mean(0)
    if config["scheme"] == "expert" and np.isfinite(box):
        score = box
    task, name = Path(os.path.abspath(folder)).parts[-3:-1]
    algo, _, label = name.partition("-")
    return run | {"task": task, "algo": algo, "label": label, "rows": rows, "step": rows.step.iloc[-1],
                  "normalised": np.isfinite(score), "score": score if np.isfinite(score) else value}


def read_audit(folder: Path) -> np.ndarray | None:
    """Figure 6's divergences and value gains, (2, at most 3,000)."""
    if not (folder / "audit.npz").exists():
        return None
    with oap.blame("audit.npz can't be read"), np.load(folder / "audit.npz") as arrays:
        points = np.stack([arrays["divergence"], arrays["value_gain"]]).astype(float)
        oap.check(points.ndim == 2 and points.size > 0, f"not two lists: {points.shape}")
        return points[:, np.random.default_rng(0).permutation(points.shape[1])[:3000]]


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
            seeds, others = first.setdefault(folder.parent, ({}, run["settings"]))
            changed = [k for k in run["settings"] | others if run["settings"].get(k) != others.get(k)]
            oap.check(not changed, f"other settings than its neighbour: {', '.join(changed)}")
            other = seeds.setdefault(run["seed"], folder)
            oap.check(other == folder, f"its seed is also in {other.name}")
            runs.append(run | {"audit": None})
            runs[-1]["audit"] = read_audit(folder)  # without it, the scores still count
        except oap.BadInput as error:
            left_out.append(f"{folder}: {error}")
    return pd.DataFrame(runs), left_out


def table(runs: pd.DataFrame, labels: list[str], paper: pd.DataFrame) -> str:
    """Tasks x labels in Markdown; averages where all tasks of the paper's domain are there."""
    theirs = {(p.task, p.column): f" [{p.mean:g}" + (f" ± {p.std:g}]" if p.std >= 0 else "]")
              for p in paper[paper.algo == runs.algo.iloc[0]].itertuples(index=False)}
    lines = [["task", *labels], ["---"] * (1 + len(labels))]

    def add(name: str, task: str, scores: list[pd.Series], notes: list[str]) -> None:
        cells = []
        for label, own, note in zip(labels, scores, notes, strict=True):
            std = f" ± {own.std(ddof=0):.1f}" if len(own) > 1 else ""
            cell = f"{own.mean():.1f}{std}{note}" if len(own) else ""
            known = theirs.get((task, column(label)), "") if cell or label in COLORS else ""
            cells.append((cell + known).strip())
        lines.append([name, *cells])

    known = [task for task in paper.task.unique() if task in set(runs.task)]
    for task in known + sorted(set(runs.task) - set(known)):
        same = runs[runs.task == task]
        groups = [same[same.label == label] for label in labels]
        notes = [f"{'' if x.normalised.all() else ' return'} ({len(x)}, {x.step.min() / 1000:g}k)"
                 for x in groups]
        data = "/".join(sorted({f"{x:.0f}" for x in same.data.dropna()}))
        robot = task.lower().partition("-")[0].removeprefix("adroithand")  # as in Table 4
        add(f"{task} (data: {data})" if data else task, robot if "expert" in labels[0] else task,
            [x.score for x in groups], notes)
    members = paper[(paper.table == 2) & ~paper.task.str.contains("average")].task.unique()
    for name in ("gym average", "antmaze average", "adroit average", "average"):
        tasks = [x for x in members if f"{oap.find_robot(x).domain} average".endswith(name)]
        means = [runs[runs.label == x].pivot_table("score", "seed", "task").reindex(columns=tasks)
                 .dropna().mean(axis=1) for x in labels]
        if any(map(len, means)):
            add(name, name, means, [f" ({len(x)})" for x in means])
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


def panels(count: int) -> tuple[plt.Figure, list]:
    """A figure and its axes, three in a row."""
    across, down = min(count, 3), -(-count // 3)
    figure, axes = plt.subplots(down, across, squeeze=False, layout="constrained",
                                figsize=(4.8 * across, 3.9 * down))
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, list(axes.flat[:count])


def legend_below(ax: plt.Axes) -> None:
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize="small")


def bars(ax: plt.Axes, title: str, shown: pd.DataFrame) -> None:
    """`shown` has a row a bar: mean, std, n and color."""
    ax.bar(range(len(shown)), shown["mean"], yerr=shown["std"], capsize=3, color=shown.color)
    names = [f"{name} (n={n:.0f})" if n > 0 else name for name, n in shown.n.items()]
    ax.set_xticks(range(len(shown)), names, rotation=45, ha="right", rotation_mode="anchor")
    ax.set(title=title, ylabel="normalised score")


def figure_3(runs: pd.DataFrame) -> tuple | None:
    """rliable's four aggregates over the tasks that every scheme has run."""
    runs = runs[runs.label.isin(oap.SCHEMES)]
    grids = {x: runs[runs.label == x].pivot(index="seed", columns="task", values="score") / 100
             for x in ordered(runs.label)}
    tasks = sorted(set.intersection(*map(set, grids.values()))) if grids else []
    grids = {x: grid[tasks].dropna().to_numpy() for x, grid in grids.items()}
    grids = {x: grid for x, grid in grids.items() if grid.size}
    if len(grids) < 2:
        return None
    names = {"median": metrics.aggregate_median, "IQM": metrics.aggregate_iqm,
             "mean": metrics.aggregate_mean, "optimality gap": metrics.aggregate_optimality_gap}
    points, intervals = library.get_interval_estimates(
        grids, lambda x: np.array([f(x) for f in names.values()]), reps=2000,
        random_state=np.random.RandomState(0))
    figure, axes = plt.subplots(1, len(names), sharey=True, layout="constrained",
                                figsize=(11, 1.2 + 0.35 * len(grids)))
    for i, (ax, name) in enumerate(zip(axes, names, strict=True)):
        for label, grid in grids.items():
            (low, high), bar = intervals[label][:, i], f"{label} (n={len(grid)})"
            ax.barh(bar, high - low, 0.6, low, color=COLORS[label], alpha=0.4)
            ax.plot(points[label][i], bar, "|", color=COLORS[label], ms=14, mew=2)
        ax.set_title(name)
        ax.use_sticky_edges = False  # a margin beside the bars
        ax.locator_params(axis="x", nbins=4)
    axes[0].invert_yaxis()
    figure.supxlabel("normalised score / 100", fontsize="medium")
    return figure, f"Figure 3: 95 % stratified bootstrap intervals over {', '.join(tasks)}"


def figure_4(runs: pd.DataFrame) -> tuple | None:
    """Other algorithms' published figures beside ours, over the tasks that all of them have."""
    published = pd.read_csv(RESULTS / "published.csv")
    runs = runs[runs.label.isin(["offline", "o2o", "oap"]) & runs.task.isin(published.task)]
    labels = runs.groupby("task").label.nunique()
    tasks = labels[labels == runs.label.nunique()].index.to_series()
    if tasks.empty:
        return None
    domains = tasks.groupby(tasks.map(lambda x: oap.find_robot(x).domain))
    figure, axes = panels(len(domains))
    for ax, (name, same) in zip(axes, domains, strict=True):
        theirs = published[published.task.isin(same)].groupby("algo", sort=False)[["mean"]].mean()
        ours = runs[runs.task.isin(same)].groupby(["label", "seed"]).score.mean()
        ours = spread(ours.groupby("label")).loc[ordered(runs.label)]
        ours = ours.assign(color=pd.Series(COLORS)).rename(f"{runs.algo.iloc[0]} {{}}".format)
        bars(ax, name, pd.concat([theirs.assign(color="#BBBBBB"), ours]))
    return figure, (f"Figure 4: means over {', '.join(tasks)}, and standard deviation over seeds;"
                    f" grey: {', '.join(published.source.unique())}")


def figure_5(runs: pd.DataFrame) -> tuple | None:
    """OAP's score against its black box's, for tasks that were run with several black boxes."""
    found = []
    for task, same in runs.groupby("task"):
        # The plain "oap" comes first; of the others, those that differ in the black box alone.
        asking = same[(same.label.map(column) == "oap") & same.box.notna()].sort_values("label")
        recipe = asking.settings.map(lambda x: str(sorted(
            (k, v) for k, v in x.items() if k != "tag" and not k.startswith("expert"))))
        asking = asking[recipe.isin(recipe[:1])]
        labels = asking.drop_duplicates("label").drop_duplicates("box").label
        if len(labels) > 1:
            found.append((task, same, asking[asking.label.isin(labels)].groupby("box").score))
    if not found:
        return None
    figure, axes = panels(len(found))
    for ax, (task, same, scores) in zip(axes, found, strict=True):
        shown = spread(scores)
        ax.errorbar(shown.index, shown["mean"], shown["std"], marker="o", capsize=3,
                    color=COLORS["oap"], label=f"oap (n={shown.n.min()})")
        plain = spread(same[same.label.isin(["offline", "o2o"])].groupby("label").score)
        for label, mean, std, n in plain.itertuples():
            ax.axhline(mean, color=COLORS[label], linestyle="--", label=f"{label} (n={n})")
            ax.axhspan(mean - std, mean + std, color=COLORS[label], alpha=0.1, linewidth=0)
        ax.set(title=task, xlabel="normalised score of the black box", ylabel="normalised score")
        legend_below(ax)
    return figure, "Figure 5: mean and standard deviation over seeds"


def figure_6(runs: pd.DataFrame) -> tuple:
    """A task's learning curves, few in a panel; then divergence against value gain."""
    unit, name = ("score", "normalised score") if runs.normalised.all() else ("return", "return")
    kinds = runs.label.map(lambda x: "schemes" if x in (*oap.SCHEMES, "expert") else
                           "variants" if x in COLORS else "tagged")
    audits = runs[runs.audit.notna()].drop_duplicates("label")
    figure, axes = panels(kinds.nunique() + len(audits))
    for ax, (kind, some) in zip(axes, runs.groupby(kinds)):
        for i, label in enumerate(ordered(some.label)):
            seeds = [x.set_index("step")[unit] for x in some[some.label == label].rows]
            curve = spread(pd.concat(seeds).groupby("step"))
            curve = curve[curve.n == len(seeds)]
            step, color = curve.index / 1000, COLORS.get(label, list(COLORS.values())[3 + i % 6])
            ax.plot(step, curve["mean"], ("-", "--", "-.", ":")[i % 4], color=color,
                    marker="o" if len(step) == 1 else "", label=f"{label} (n={len(seeds)})")
            ax.fill_between(step, curve["mean"] - curve["std"], curve["mean"] + curve["std"],
                            color=color, alpha=0.15, linewidth=0)
        ax.sharey(axes[0])
        ax.set(title=kind, xlabel="updates (thousands)", ylabel=name)
        legend_below(ax)
    for ax, run in zip(axes[kinds.nunique():], audits.itertuples(), strict=True):
        ax.scatter(*run.audit, s=4, alpha=0.3, edgecolors="none", color=COLORS["oap"])
        ax.axhline(0, color="#999999", linewidth=0.8)
        ax.set(title=f"Figure 6: {run.label}, seed {run.seed}", ylabel="value gain (return)",
               xlabel="divergence (π(s) - a)²")
    figure.suptitle(task := runs.task.iloc[0])
    return figure, f"{task}: mean and standard deviation over seeds" + (
        "; Figure 6: Q*(s, π(s)) - Q*(s, a) of up to 3,000 samples" if len(audits) else "")


def figure_7(runs: pd.DataFrame) -> tuple | None:
    """The four ways to time interactions and queries, a panel a task."""
    runs = runs[runs.label.isin(TABLES["Figure 7: timing"])]
    tasks = sorted(runs[~runs.label.isin(oap.SCHEMES)].task.unique())
    if not tasks:
        return None
    figure, axes = panels(len(tasks))
    for ax, task in zip(axes, tasks, strict=True):
        shown = spread(runs[runs.task == task].groupby("label").score)
        bars(ax, task, shown.loc[ordered(shown.index)].assign(color=pd.Series(COLORS)))
    return figure, "Figure 7: mean and standard deviation over seeds"


def report(root: Path, out: Path) -> str:
    """Writes report.md and its pictures to `out`; returns what was done, in lines."""
    runs, left_out = read_runs(root)
    oap.check(len(runs), "; ".join([f"{root} has no finished run", *left_out]))
    paper, text = pd.read_csv(RESULTS / "paper.csv"), [f"# {root}", RULES]
    for (collection, algo), group in runs.groupby(["collection", "algo"]):
        text += [f"## {f'{collection}: ' if collection else ''}{algo}",
                 f"Made by oap.py of commit {', '.join(sorted(group.commit.unique()))}.",
                 *tables(group, paper)]
        figures = {f"figure-{i}": (draw, group[group.normalised]) for i, draw in (
            (3, figure_3), (4, figure_4), (5, figure_5), (7, figure_7))}
        figures |= {task: (figure_6, same) for task, same in group.groupby("task")}
        for name, (draw, shown) in figures.items():
            if (drawn := draw(shown)) is None:
                continue
            path = Path(collection, f"{algo}-{name}.png")
            drawn[0].savefig(picture := io.BytesIO(), format="png", dpi=130)
            plt.close(drawn[0])
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            oap.write(out / path, picture.getvalue())
            text.append(f"![{algo} {name}]({quote(path.as_posix())})\n\n*{drawn[1]}*")
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
    warnings.filterwarnings("ignore", category=FutureWarning, module="arch")  # rliable's calls
    try:
        print(report(args.runs, args.out), flush=True)
    except BrokenPipeError:  # nobody reads the lines; the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (oap.BadInput, OSError) as error:
        parser.exit(2, f"{' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
