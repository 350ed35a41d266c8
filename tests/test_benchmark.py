"""tests/benchmark.py runs, with one step: all tables but that of scaling. What it measures is looked at by people."""

import random
import re
import subprocess
import sys
from pathlib import Path

import stress

import data

BENCHMARK = Path(__file__).parent / "benchmark.py"


def test_benchmark_prints_its_tables(tmp_path):
    draw = random.Random(1)
    words = ["".join(draw.choices("aeioubcdfglmnprst", k=draw.randint(2, 7))) for _ in range(300)]
    (tmp_path / "text.txt").write_text("\n\n".join(" ".join(draw.choices(words, k=200)) for _ in range(300)))
    data.prepare([tmp_path / "text.txt"], name="docs", data_dir=str(tmp_path), vocab_size=400, val_fraction=0.1, workers=1)
    command = [sys.executable, BENCHMARK, "--preset=tiny", "--steps=1", "--peers=none", "--levers=recompute",
               "--parts=steps,around,projection", f"--data_dir={tmp_path}"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    rows = {cells[1]: cells[2:-1] for cells in ([cell.strip() for cell in line.split("|")]
                                                for line in said.stdout.splitlines() if line.startswith("|"))}
    for name in ("ours, float32", "ours, recompute=True", "a validation", "tokenising", "base"):
        assert re.search(r"[1-9]", rows[name][0]), name


def test_benchmark_names_a_wrong_option():
    (process,) = stress.start("--parts=everything", program=(str(BENCHMARK),))
    _, err = process.communicate()
    assert process.returncode == 2 and "--parts is a list of" in err and "Traceback" not in err
