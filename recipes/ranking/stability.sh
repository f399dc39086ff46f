#!/usr/bin/env bash
# Does SBN train where one batch norm does not? Half an epoch of CIFAR-10 at 16x16 pixels at rising learning rates: nano
# with sums of up to 2 and 3 paths, a quarter of S1 with sums of up to 4. What is done is skipped.
#
#   recipes/ranking/stability.sh OUTPUT PROCESSES [DATA OPTIONS of timm-mixpath train ...]
#
# PROCESSES of one thread (OMP_NUM_THREADS) share the trainings. stability.py makes table, figure and CSV. For example,
# with torchvision's CIFAR-10:
#
#   recipes/ranking/stability.sh output/stability 2 --dataset torch/cifar10 --dataset-download --data-dir data
#   python recipes/ranking/stability.py output/stability recipes/ranking/stability
set -euo pipefail
: "${2:?usage: stability.sh OUTPUT PROCESSES [DATA OPTIONS]}"
export OUTPUT=$1 processes=$2
shift 2
export DATA="$*" RECIPES OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
RECIPES=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$OUTPUT"

one() {
    local norm=$1 m=$2 lr=$3 clip=$4 model=mixpath_nano_supernet options=() kwargs=()
    local run=$norm-$m-$lr-$clip
    [ ! -e "$OUTPUT/$run/done" ] || return 0
    rm -rf "${OUTPUT:?}/$run"
    [ "$clip" = none ] || options=(--clip-grad "$clip")
    [ "$m" != 4 ] || model=mixpath_s1_supernet kwargs=(width_mult=0.25)
    grep -v '^clip_grad:' "$RECIPES/nano_supernet_cifar10.yaml" > "$OUTPUT/$run.yaml"
    # shellcheck disable=SC2086
    timm-mixpath train -c "$OUTPUT/$run.yaml" --model "$model" --input-size 3 16 16 --epochs 1 --warmup-epochs 0.2 \
        --search-holdout 0.5 --val-split '' --cache-images --cpu-kernels $DATA --lr "$lr" "${options[@]}" \
        --model-kwargs sum_norm="$norm" m="$m" "${kwargs[@]}" --output "$OUTPUT" --experiment "$run" \
        > "$OUTPUT/$run.log" 2>&1 ||
        # A loss that is not finite ends a training: that is a result, too, and any other end is none
        grep -Eq 'the loss is -?(nan|inf) in epoch' "$OUTPUT/$run.log" ||
        { echo "$run failed, see $OUTPUT/$run.log" >&2; return 1; }
    mkdir -p "$OUTPUT/$run" && touch "$OUTPUT/$run/done"
    echo "$run done"
}
export -f one

for clip in none 5.0; do
    for lr in 0.1 0.4 1.6 6.4; do
        for m in 2 3 4; do
            for norm in sbn bn; do echo "$norm $m $lr $clip"; done
        done
    done
done | xargs -P "$processes" -L 1 bash -c 'one "$@"' _
