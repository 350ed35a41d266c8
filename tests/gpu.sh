#!/usr/bin/env bash
# For a machine with CUDA that is there for minutes: torch and this checkout are all it needs.
#
#     bash tests/gpu.sh [--minutes=8] [--out=out/gpu] [--data_dir=data] [--dataset=wiki_books]
#
# tests/test_cuda.py, then tests/benchmark.py, then in the time that is left RTD, CLM, COCO-LM and MLM beside
# each other, preset tiny, with the same number of tokens. What comes is in --out at once: cuda.txt,
# benchmark.txt, a log of each row, and study.jsonl. Without the corpus wiki_books the text is docs. PYTHON
# names another Python.
set -uo pipefail
cd "$(dirname "$0")/.."
minutes=8 out=out/gpu data_dir=data dataset=wiki_books python=${PYTHON:-python3} tokens=100000000
for argument; do
    case $argument in
        --minutes=*|--out=*|--data_dir=*|--dataset=*) declare "${argument:2}" ;;
        *) echo "gpu.sh: $argument is no option; see the top of tests/gpu.sh" >&2; exit 2 ;;
    esac
done
left() { echo $((minutes * 60 - SECONDS)); }
say() { echo "[${SECONDS} s] $*"; }

mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONUNBUFFERED=1
cuda=$($python -c 'import torch; print(int(torch.cuda.is_available()))') || exit 1
[ "$cuda" = 1 ] || say "there is no CUDA on this machine: no tests, no benchmark, rows on the CPU"

say "tests/test_cuda.py"
timeout "$(($(left) / 2))" $python -m pytest -rsw --durations=5 tests/test_cuda.py 2>&1 |
    tee "$out/cuda.txt" | tail -n 30

if [ "$cuda" = 1 ] && [ "$(left)" -gt 30 ]; then
    say "tests/benchmark.py"
    timeout "$(($(left) * 2 / 3))" $python tests/benchmark.py --device=cuda 2>&1 | tee "$out/benchmark.txt"
fi

[ -d "$data_dir/$dataset" ] || dataset=docs
[ -d "$data_dir/$dataset" ] || $python data.py --data_dir="$data_dir" || exit 1
[ "$cuda" = 1 ] && batch=512 || batch=32
setup="--max_len=64 --batch_size=$batch --micro_batch_size=$batch --learning_rate=0.0015 --eval_batches=4"
setup+=" --log_interval=20 --compile=False"

rows() {  # rows STEPS SECONDS NAME...: trains these beside each other; their logs go to $out as they grow
    local steps=$1 end=$((SECONDS + $2)) name
    shift 2
    for name; do
        timeout "$((end - SECONDS))" $python tests/study.py run --preset=tiny --seeds=1 --steps="$steps" \
            --only="$name-$steps-1" --data_dir="$data_dir" --dataset="$dataset" --setup="$setup" \
            --glue_dir=none --work_dir="$work/rows" --results_dir="$work/results" >"$work/$name.txt" 2>&1 &
    done
    while sleep 2; do
        for name; do cp -f "$work/rows/$name-$steps-1/log.jsonl" "$out/$name.jsonl" 2>/dev/null; done
        cat "$work"/results/tiny/*-"$steps"-1.json >"$out/study.jsonl" 2>/dev/null
        [ -n "$(jobs -rp)" ] || break
    done
}

[ "$(left)" -gt 60 ] || { say "no time is left for the rows"; exit 0; }
say "how fast the rows are beside each other: 60 steps"
names="rtd clm coco-lm mlm"
rows 60 "$(($(left) / 3))" $names
slowest=$(for name in $names; do
    grep '"split": "train"' "$out/$name.jsonl" | tail -n 1 | sed 's/.*"tokens_per_sec": \([0-9]*\).*/\1/'
done 2>/dev/null | sort -n | head -n 1)
if [ -z "$slowest" ]; then
    say "the rows do not run, or are too slow for the time:"
    tail -n 5 "$work"/*.txt "$work"/rows/*/output.txt
    exit 1
fi
steps=$((($(left) - 25) * slowest * 3 / 4 / (batch * 64)))  # 25 s: to start and to validate
[ $steps -le $((tokens / batch / 64)) ] || steps=$((tokens / batch / 64))
[ $steps -ge 20 ] || { say "no time is left for the rows"; exit 0; }
say "$names: $steps steps, $((steps * batch * 64)) tokens each, $slowest tokens/s"
rm -f "$out/study.jsonl"
rows $steps "$(left)" $names
for name in $names; do
    echo "$name: $(grep '"split": "val"' "$out/$name.jsonl" | tail -n 1)"
done
say "done; all of it is in $out"
