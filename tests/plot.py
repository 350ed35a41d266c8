"""Draws the curves of a run of train.py, or of several to compare them.

    python tests/plot.py out             one run: the first two of COLUMNS that it has
    python tests/plot.py out out/other   several runs: all of COLUMNS; a run is named by its folder

Writes curves.png into the first folder. It needs matplotlib.
"""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np

COLUMNS = {"mlm_loss": "auxiliary, lower is better", "copy_auc": "copy head, higher is better",
           "lm_loss": "LM head, lower is better", "scl_loss": "contrastive, lower is better"}
COLOURS = ("#3d85c6", "#d9822b", "#3f9b5b", "#9b6bbf", "#cc4b4b", "#b8860b")
GREY = "#808080"  # can be read on white and on black
STYLE = {"savefig.transparent": True, "axes.spines.top": False, "axes.spines.right": False, "font.size": 11,
         "axes.titlesize": 11, "axes.titlelocation": "left", "axes.ymargin": 0.12} | dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)


def draw_level(ax, y, text, x=1, ha="right"):
    """Draws a dotted line across ax, with its text above."""
    ax.axhline(y, ls=":", color=GREY, lw=2)
    ax.annotate(text, (x, y), (0, 2), xycoords=ax.get_yaxis_transform(), textcoords="offset points", ha=ha,
                va="bottom")


def label_ends(ax, labels):
    """Writes labels (text, x, y, colour) at the ends of lines. They keep their order and do not overlap."""
    low, high = ax.get_ylim()
    gap, label_y = (high - low) / max(9, len(labels)), math.inf
    for place, (text, x, y, colour) in enumerate(sorted(labels, key=lambda label: -label[2]), 1):
        label_y = min(y, label_y - gap)
        lowest = low + (len(labels) - place + 0.5) * gap  # leaves room for the labels that follow
        ax.annotate(text, (x, max(label_y, lowest)), (4, 0), textcoords="offset points", va="center",
                    color=colour, annotation_clip=False)


def read_log(folder):
    """The header of folder/log.jsonl and its rows. A line that a crash has torn is left out."""
    path, lines = Path(folder, "log.jsonl"), []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            pass
    rows = [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
    if not rows or not isinstance(lines[0], dict):
        raise ValueError(f"{path} is not the log of a run, or has no rows yet.")
    return lines[0], rows


def curve(rows, split, column):
    """The steps of a column and its values: two arrays. null becomes nan, which is a gap in the line."""
    points = [(row["step"], row[column]) for row in rows if row.get("split") == split and column in row]
    return np.array(points, float).reshape(-1, 2).T


def draw(folders):
    """Draws and saves the figure -> its path"""
    from matplotlib import pyplot as plt
    plt.switch_backend("agg")  # it needs no screen
    plt.rcParams.update(STYLE)
    headers, logs = zip(*map(read_log, folders))
    names = [Path(os.path.abspath(folder)).name for folder in folders]
    names = names if len(set(names)) == len(names) else folders
    columns = [column for column in COLUMNS if any(column in row for rows in logs for row in rows)]
    columns = columns if len(logs) > 1 else columns[:2]
    if not columns:
        raise ValueError(f"{folders[0]}/log.jsonl has none of {', '.join(COLUMNS)}.")
    last = max(row["step"] for rows in logs for row in rows)
    size = 5.2, max(2, 0.6 + 0.2 * len(logs)) * len(columns) + 0.4
    _, axes = plt.subplots(len(columns), figsize=size, layout="constrained", squeeze=False, sharex=True)
    for ax, column in zip(axes[:, 0], columns):
        labels = []
        for i, (name, rows) in enumerate(zip(names, logs)):
            look = {"color": COLOURS[i % 6], "ls": ("-", "--", "-.", ":")[i // 6 % 4]}
            ax.plot(*curve(rows, "train", column), **look, lw=1, alpha=0.6)
            x, y = curve(rows, "val", column)
            ax.plot(x, y, **look, lw=2, marker="o", ms=4)
            labels += [(name, last, value, look["color"]) for value in y[np.isfinite(y)][-1:]]
        has_training = any(curve(rows, "train", column).size for rows in logs)
        ax.set_title(f"{column}: {COLUMNS[column]}" + (" (thin: training)" if has_training else ""))
        for level in {header.get("nothing_learned", {}).get(column) for header in headers} - {None}:
            draw_level(ax, level, "nothing learned")
        if len(logs) > 1:
            label_ends(ax, labels)
    axes[-1, 0].set_xlim(right=1.01 * last)
    axes[-1, 0].set_xlabel("steps")
    axes[-1, 0].locator_params(axis="x", nbins=6)
    axes[-1, 0].xaxis.set_major_formatter("{x:,.0f}")
    plt.savefig(Path(folders[0], "curves.png"), dpi=160)
    plt.close()
    return Path(folders[0], "curves.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run: out_dir of train.py")
    try:
        print(draw(parser.parse_args(argv).runs))
    except ImportError:
        parser.exit(2, "plot.py: the figure needs a package: pip install matplotlib\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"plot.py: {error}\n")


if __name__ == "__main__":
    main()
