#!/usr/bin/env bash
# Does SBN train where one batch norm does not? One epoch of nano on CIFAR-10 at 16x16 pixels at rising learning rates,
# with sums of up to 2 and 3 paths. What is done is skipped.
#
#   recipes/ranking/stability.sh OUTPUT PROCESSES [DATA OPTIONS of timm-mixpath train ...]
#
# It ends with a table of the training loss and of the top-1 on the validation set, of one arch of the last step.
set -euo pipefail
: "${2:?usage: stability.sh OUTPUT PROCESSES [DATA OPTIONS]}"
export OUTPUT=$1 processes=$2
shift 2
export DATA="$*" RECIPES OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
RECIPES=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$OUTPUT"

one() {
    local norm=$1 m=$2 lr=$3 clip=$4
    local run=$norm-$m-$lr-$clip options=()
    [ ! -e "$OUTPUT/$run/done" ] || return 0
    rm -rf "${OUTPUT:?}/$run"
    [ "$clip" = none ] || options=(--clip-grad "$clip")
    # shellcheck disable=SC2086
    grep -v '^clip_grad:' "$RECIPES/nano_supernet_cifar10.yaml" > "$OUTPUT/$run.yaml"
    timm-mixpath train -c "$OUTPUT/$run.yaml" --input-size 3 16 16 --epochs 1 --warmup-epochs 0.2 --cache-images \
        --cpu-kernels $DATA --lr "$lr" "${options[@]}" --model-kwargs sum_norm="$norm" m="$m" \
        --output "$OUTPUT" --experiment "$run" > "$OUTPUT/$run.log" 2>&1 ||
        # A loss that is not finite ends a training: that is a result, too, and any other end is none
        grep -Eq 'the loss is -?(nan|inf) in epoch' "$OUTPUT/$run.log" ||
        { echo "$run failed, see $OUTPUT/$run.log" >&2; return 1; }
    mkdir -p "$OUTPUT/$run" && touch "$OUTPUT/$run/done"
}
export -f one

for clip in 5.0 none; do
    for lr in 0.1 0.4 1.6 6.4; do
        for m in 2 3; do
            for norm in sbn bn; do echo "$norm $m $lr $clip"; done
        done
    done
done | xargs -P "$processes" -L 1 bash -c 'one "$@"' _

python - "$OUTPUT" <<'P'
import csv
import sys
from pathlib import Path

print('| norm | m | learning rate | clipped at | training loss | top-1 (%) |\n|---|---|---|---|---|---|')
for done in sorted(Path(sys.argv[1]).glob('*/done'), key=lambda p: (p.parts[-2].split('-')[1:], p.parts[-2])):
    norm, m, lr, clip = done.parent.name.split('-')
    summary = done.with_name('summary.csv')
    cells = ['diverged', '']
    if summary.exists():
        row = list(csv.DictReader(summary.open()))[-1]
        cells = [f'{float(row["train_loss"]):.3f}', f'{float(row["eval_top1"]):.1f}']
    print('| ' + ' | '.join([norm, m, lr, clip, *cells]) + ' |')
P
