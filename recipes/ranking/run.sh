#!/usr/bin/env bash
# Trains the supernets of README.md beside this file and ranks with them: two spaces, three norms behind the sums, three
# seeds, and one more way of sampling. What is done is skipped and what was cut off goes on: run it as often as you like.
#
#   recipes/ranking/run.sh TABLES OUTPUT [PROCESSES] [DATA OPTIONS of timm-mixpath train ...]
#
# TABLES holds nb201.csv and nb101_multipath.csv. For example, with torchvision's CIFAR-10:
#
#   recipes/ranking/run.sh tables output/ranking 2 --dataset torch/cifar10 --dataset-download --data-dir data
set -euo pipefail
: "${2:?usage: run.sh TABLES OUTPUT [PROCESSES] [DATA OPTIONS]}"
export TABLES=$1 OUTPUT=$2 PROCESSES=${3:-1}
shift $(($# < 3 ? $# : 3))
export DATA="$*" RECIPES
RECIPES=$(cd "$(dirname "$0")/.." && pwd)
export OMP_NUM_THREADS=1

one() {
    local space=$1 norm=$2 sampling=$3 seed=$4
    local run=$space-$norm-$sampling-$seed
    local folder=$OUTPUT/$run table=$TABLES/nb201.csv resume=() kwargs=(num_cells=1) archs=(--num-archs 500)
    [ "$space" = nb101 ] && table=$TABLES/nb101_multipath.csv kwargs=(width=16 num_cells=1) archs=(--top-k 5)
    [ -e "$folder/rank/ranking.json" ] && return
    if [ ! -e "$folder/trained" ]; then
        [ -e "$folder/last.pth.tar" ] && resume=(--resume "$folder/last.pth.tar")
        # shellcheck disable=SC2086
        timm-mixpath train -c "$RECIPES/${space}_supernet.yaml" --cache-images $DATA --seed "$seed" "${resume[@]}" \
            --model-kwargs "${kwargs[@]}" sum_norm="$norm" sampling="$sampling" \
            --output "$OUTPUT" --experiment "$run" >> "$OUTPUT/$run.log" 2>&1 || return 1
        touch "$folder/trained"
    fi
    timm-mixpath rank --checkpoint "$folder/last.pth.tar" --table "$table" "${archs[@]}" \
        --num-images 2000 --recalibration-images 512 --batch-size 250 --output "$folder/rank" > "$folder/rank.log" 2>&1 ||
        return 1
    echo "$run done"
}
export -f one

mkdir -p "$OUTPUT"
{
    for seed in 0 1 2; do
        for norm in sbn bn none; do echo "nb201 $norm paths $seed"; done
        for norm in sbn bn none; do echo "nb101 $norm paths $seed"; done
        echo "nb201 sbn fair $seed"
    done
} | xargs -P "$PROCESSES" -L 1 bash -c 'one "$@" || echo "$* failed, see its log in $OUTPUT" >&2' _
