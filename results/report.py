"""The paper's tables and figures from run folders.

    python results/report.py runs                  # writes runs/report/report.md and its pictures
    python results/report.py results/runs --out /tmp/report

A run is a folder <collection>/<env>/<algo>-<label>/<seed> with config.json and progress.csv, and is
named by it. Each collection, the path between RUNS and <env>, is an experiment of its own.
"""

import argparse
import csv
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

try:
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd
    from rliable import library, metrics
except ImportError as error:
    print(f"{error}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

RESULTS = Path(__file__).resolve().parent
RULES = """A cell is the mean ± standard deviation over seeds (how many, updates), in brackets the
paper's. A seed's score is the mean of its last 10 evaluations; a trained black box's is that of
the policy that was kept, if it was measured. Tasks without reference returns show returns."""
SCHEMES = ("offline", "online", "online-mix", "o2o", "oap")
TABLES = {
    "Table 2: training schemes": SCHEMES,
    "Table 3: RankNet": ("oap", "oap-inf", "oap-no-ranknet"),
    "Table 4: black boxes": ("expert",),
    "Figure 7: timing": ("o2o", "o2o-interval", "oap-ft", "oap"),
}
COLORS = {  # Okabe and Ito's, which colour-blind readers can tell apart; also the labels' order
    "offline": "#000000", "online": "#CC79A7", "online-mix": "#009E73", "o2o": "#E69F00",
    "o2o-interval": "#CC79A7", "oap-ft": "#009E73", "oap-no-ranknet": "#D55E00",
    "oap-inf": "#56B4E9", "oap": "#0072B2", "expert": "#000000",
}
# What may differ between seeds: paths, versions and the machine; and an audit only measures.
FREE = {"seed", "dataset", "expert", "versions", "program", "out", "device", "checkpoint_every",
        "wandb", "audit"}


class Broken(Exception):
    """What can't be used; the message says why."""


def domain(env: str) -> str:
    adroit = env.startswith(("pen", "door", "AdroitHand"))
    return "antmaze" if env.startswith("antmaze") else "adroit" if adroit else "gym"


def column(label: str) -> str:
    """The column of the paper that a label belongs to: "oap-ft-mytag" -> "oap-ft"."""
    return max((c for c in COLORS if f"{label}-".startswith(f"{c}-")), key=len, default="")


def ordered(labels) -> list[str]:
    names = [*COLORS, ""]
    return sorted(set(labels), key=lambda label: (names.index(column(label)), label))


def spread(groups) -> pd.DataFrame:
    return groups.agg(mean="mean", std=lambda x: x.std(ddof=0), n="count")


def read(path: Path, parse: Callable) -> object:
    try:
        return parse(path)
    except Exception as error:  # whatever is wrong with one file, the report goes on without it
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise Broken(f"{path.name} can't be read ({why[:200]})") from error


def read_config(path: Path) -> dict:
    config = json.loads(path.read_text(encoding="utf-8"))
    updates = config["steps"] + config["finetune_steps"] * (config["scheme"] in ("o2o", "oap"))
    settings = {k: json.dumps(v) for k, v in config.items() if k not in FREE}  # NaN equals itself
    data, box = (float("nan" if config.get(k) is None else config[k])
                 for k in ("data_score", "expert_score"))
    commit = config.get("versions", {}).get("commit") or "unknown"
    return {"scheme": config["scheme"], "seed": int(config["seed"]), "updates": int(updates),
            "every": int(config["eval_every"]), "settings": settings, "data": data, "box": box,
            "program": str(config.get("program", f"commit {commit}")),
            "recipe": str([x for x in sorted(settings.items())  # but for the black box and a name
                           if x[0] != "tag" and not x[0].startswith("expert")])}


def read_progress(path: Path) -> pd.DataFrame:
    text = path.read_text(encoding="utf-8")
    lines = list(csv.reader(text.splitlines()))
    if len(lines) < 2 or not text.endswith("\n") or len(set(map(len, lines))) != 1:
        raise ValueError("no row yet, or half a row")
    rows = pd.DataFrame(lines[1:], columns=lines[0])[["step", "score", "return"]]
    rows = rows.replace("", "nan").astype(float)
    if not (np.isfinite(rows[["step", "return"]]).all(None) and (np.diff(rows.step) > 0).all()):
        raise ValueError("steps that don't increase, or a return that is not finite")
    return rows


def read_audit(path: Path) -> np.ndarray:
    """Figure 6's divergences and value gains, (2, at most 3,000)."""
    with np.load(path) as arrays:
        points = np.stack([arrays["divergence"], arrays["value_gain"]]).astype(float)
    if points.ndim != 2 or not points.size:
        raise ValueError(f"two lists of numbers were expected, not {points.shape}")
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
            config = read(folder / "config.json", read_config)
            rows = read(folder / "progress.csv", read_progress)
            step, settings = int(rows.step.iloc[-1]), config["settings"]
            if step <= config["updates"] - config["every"]:  # rows come at its multiples alone
                raise Broken(f"not finished, {step:,} of {config['updates']:,} updates")
            seeds, others = first.setdefault(folder.parent, ({}, settings))
            changed = [k for k in settings | others if settings.get(k) != others.get(k)]
            if changed:
                raise Broken(f"other settings than its neighbour: {', '.join(changed)}")
            if seeds.setdefault(config["seed"], folder) != folder:
                raise Broken(f"its seed is also in {seeds[config['seed']].name}")
        except Broken as error:
            left_out.append(f"{folder}: {error}")
            continue
        try:
            audit = folder / "audit.npz"
            audit = read(audit, read_audit) if audit.exists() else None
        except Broken as error:
            audit = left_out.append(f"{folder}: {error}; the run's scores are used")
        score, returns = rows[["score", "return"]].to_numpy()[-10:].mean(0)
        if config["scheme"] == "expert" and np.isfinite(config["box"]):
            score = config["box"]
        task, name = Path(os.path.abspath(folder)).parts[-3:-1]
        algo, _, label = name.partition("-")
        runs.append(config | {
            "collection": "/".join(folder.relative_to(root).parts[:-3]), "algo": algo,
            "label": label, "task": task, "step": step, "rows": rows,
            "audit": audit, "normalised": np.isfinite(score),
            "score": score if np.isfinite(score) else returns})
    return pd.DataFrame(runs), left_out


def table(runs: pd.DataFrame, labels: list[str], paper: pd.DataFrame) -> str:
    """Tasks x labels in Markdown; averages where all tasks of the paper's domain are there."""
    theirs = {(p.task, p.column): f"[{p.mean:g}" + (f" ± {p.std:g}]" if p.std >= 0 else "]")
              for p in paper[paper.algo == runs.algo.iloc[0]].itertuples(index=False)}
    lines = [["task", *labels], ["---"] * (1 + len(labels))]

    def add(name: str, task: str, cells: list[str]) -> None:
        robot = task.lower().partition("-")[0].removeprefix("adroithand")  # Table 4's tasks
        known = [theirs.get((robot if column(x) == "expert" else task, column(x)), "")
                 if cell or x in COLORS else "" for x, cell in zip(labels, cells, strict=True)]
        lines.append([name, *map(str.strip, map("{} {}".format, cells, known))])

    def written(scores: pd.Series, ending: str) -> str:
        std = f" ± {scores.std(ddof=0):.1f}" if len(scores) > 1 else ""
        return f"{scores.mean():.1f}{std}{ending}" if len(scores) else ""

    known = [task for task in paper.task.unique() if task in set(runs.task)]
    for task in known + sorted(set(runs.task) - set(known)):
        same, cells = runs[runs.task == task], []
        for seeds in (same[same.label == label] for label in labels):
            unit, step = "" if seeds.normalised.all() else " return", seeds.step.min() / 1000
            cells.append(written(seeds.score, f"{unit} ({len(seeds)}, {step:,g}k)"))
        data = "/".join(sorted({f"{x:.0f}" for x in same.data.dropna()}))
        add(f"{task} (data: {data})" if data else task, task, cells)
    members = [task for task in paper[paper.table == 2].task.unique() if "average" not in task]
    for name in ("gym average", "antmaze average", "adroit average", "average"):
        wanted = [task for task in members if f"{domain(task)} average".endswith(name)]
        seeds = [runs[runs.label == x].pivot_table("score", "seed", "task").reindex(columns=wanted)
                 .dropna().mean(axis=1) for x in labels]
        cells = [written(x, f" ({len(x)})") for x in seeds]
        if wanted and any(cells):
            add(name, name, cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(runs: pd.DataFrame, paper: pd.DataFrame) -> list[str]:
    """The paper's tables, as far as there are runs for them, and one of the other labels."""
    text = []
    for title, labels in {**TABLES, "Tagged runs": ordered({*runs.label} - {*COLORS})}.items():
        # Table 3 and Figure 7 repeat Table 2's columns, which alone do not make a table.
        needed = [x for x in labels if x not in SCHEMES] or labels
        chosen = runs[runs.task.isin(runs[runs.label.isin(needed)].task) & runs.label.isin(labels)]
        if len(chosen):
            text += [f"### {title}", table(chosen, labels, paper)]
    return text


def panels(count: int, width: float = 4.6) -> tuple[plt.Figure, list]:
    """A figure and its axes, three in a row."""
    across = min(count, 3)
    down = -(-count // across)
    figure, axes = plt.subplots(down, across, squeeze=False, layout="constrained",
                                figsize=(width * across, 3.9 * down))
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
    runs = runs[runs.label.isin(SCHEMES)]
    grids = {x: runs[runs.label == x].pivot(index="seed", columns="task", values="score") / 100
             for x in ordered(runs.label)}
    tasks = sorted(set.intersection(*map(set, grids.values()))) if grids else []
    scores = {x: grid[tasks].dropna().to_numpy() for x, grid in grids.items()}
    scores = {f"{x} (n={len(grid)})": grid for x, grid in scores.items() if grid.size}
    if len(scores) < 2:
        return None
    names = {"median": metrics.aggregate_median, "IQM": metrics.aggregate_iqm,
             "mean": metrics.aggregate_mean, "optimality gap": metrics.aggregate_optimality_gap}
    points, intervals = library.get_interval_estimates(
        scores, lambda x: np.array([f(x) for f in names.values()]), reps=2000,
        random_state=np.random.RandomState(0))
    figure, axes = plt.subplots(1, len(names), sharey=True, layout="constrained",
                                figsize=(11, 1.2 + 0.35 * len(scores)))
    for i, (ax, name) in enumerate(zip(axes, names, strict=True)):
        for label in scores:
            (low, high), color = intervals[label][:, i], COLORS[label.partition(" ")[0]]
            ax.barh(label, high - low, 0.6, low, color=color, alpha=0.4)
            ax.plot(points[label][i], label, "|", color=color, markersize=14, markeredgewidth=2)
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
    domains = tasks.groupby(tasks.map(domain))
    figure, axes = panels(len(domains), width=5.5)
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
        asking = asking[asking.recipe.isin(asking.recipe[:1])]
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
    kinds = {x: "schemes" if x in (*SCHEMES, "expert") else "variants" if x in COLORS else "tagged"
             for x in ordered(runs.label)}
    audits = runs[runs.audit.notna()].drop_duplicates("label")
    figure, axes = panels(len(set(kinds.values())) + len(audits))
    panel = dict(zip(dict.fromkeys(kinds.values()), axes, strict=False))
    for label, kind in kinds.items():
        rows, ax = runs[runs.label == label].rows, panel[kind]
        color = COLORS.get(label, list(COLORS.values())[3 + len(ax.lines) % 6])
        seeds = pd.concat([x.set_index("step")[unit] for x in rows], axis=1).dropna()
        mean, std, step = seeds.mean(axis=1), seeds.std(axis=1, ddof=0), seeds.index / 1000
        ax.plot(step, mean, ("-", "--", "-.", ":")[len(ax.lines) % 4], color=color,
                marker="o" if len(step) == 1 else "", label=f"{label} (n={len(rows)})")
        ax.fill_between(step, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
    for kind, ax in panel.items():
        ax.sharey(axes[0])
        ax.set(title=kind, xlabel="updates (thousands)", ylabel=name)
        legend_below(ax)
    for ax, run in zip(axes[len(panel):], audits.itertuples(), strict=True):
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
    tasks = sorted(runs[~runs.label.isin(SCHEMES)].task.unique())
    if not tasks:
        return None
    figure, axes = panels(len(tasks))
    for ax, task in zip(axes, tasks, strict=True):
        shown = spread(runs[runs.task == task].groupby("label").score)
        bars(ax, task, shown.loc[ordered(shown.index)].assign(color=pd.Series(COLORS)))
    return figure, "Figure 7: mean and standard deviation over seeds"


def write(path: Path, save: Callable[[Path], object]) -> None:
    """A file appears whole under its name, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    save(part)
    os.replace(part, path)


def report(root: Path, out: Path) -> str:
    """Writes report.md and its pictures to `out`; returns what was done, in lines."""
    runs, left_out = read_runs(root)
    if runs.empty:
        raise Broken("; ".join([f"{root} has no finished run", *left_out]))
    paper = pd.read_csv(RESULTS / "paper.csv")
    text = [f"# {root}", RULES]
    for (collection, algo), group in runs.groupby(["collection", "algo"]):
        text += [f"## {f'{collection}: ' if collection else ''}{algo}",
                 f"Made by {'; '.join(sorted(group.program.unique()))}.",
                 *tables(group, paper)]
        figures = {f"figure-{i}": (draw, group[group.normalised]) for i, draw in (
            (3, figure_3), (4, figure_4), (5, figure_5), (7, figure_7))}
        figures |= {task: (figure_6, same) for task, same in group.groupby("task")}
        for name, (draw, shown) in figures.items():
            if (drawn := draw(shown)) is None:
                continue
            figure, caption = drawn
            path = Path(collection, f"{algo}-{name}.png")
            write(out / path, lambda part, f=figure: f.savefig(part, format="png", dpi=130))
            plt.close(figure)
            text.append(f"![{algo} {name}]({quote(path.as_posix())})\n\n*{caption}*")
    text += ["## Left out", "\n".join(f"- {x}" for x in left_out)] if left_out else []
    write(out / "report.md", lambda part: part.write_text("\n\n".join(text) + "\n", "utf-8"))
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
        print(report(args.runs, args.out))
    except (Broken, OSError) as error:
        parser.exit(2, f"{' '.join(str(error).split())}\n")


if __name__ == "__main__":
    main()
