#!/usr/bin/env bash
# Trains the supernets of README.md beside this file and ranks with them: two spaces, three norms behind the sums, three
# seeds, and one more way of sampling. What is done is skipped and what was cut off goes on: run it as often as you like.
#
#   [SPACES='nb201 nb101'] recipes/ranking/run.sh TABLES OUTPUT [PROCESSES] [DATA OPTIONS of timm-mixpath train ...]
#
# TABLES holds nb201.csv and nb101_multipath.csv. SPACES are nb201 and nb101, at 8x8 pixels, by default; nb201at32 is the
# first at 32x32 pixels for 8 epochs, without the other sampling, and takes 20 minutes of a core per training and
# ranking. For example, with torchvision's CIFAR-10:
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
    local folder=$OUTPUT/$run table=$TABLES/nb201.csv kwargs=(num_cells=1) archs=(--num-archs 500)
    local recipe=$RECIPES/nb201_supernet.yaml options=() images=(--num-images 2000 --recalibration-images 512)
    case $space in
        nb201) ;;
        nb101)
            recipe=$RECIPES/nb101_supernet.yaml table=$TABLES/nb101_multipath.csv
            kwargs=(width=16 num_cells=1) archs=(--top-k 5)
            ;;
        nb201at32)
            options=(--input-size 3 32 32 --epochs 8 --val-interval 8) archs=(--num-archs 200)
            images=(--num-images 1000 --recalibration-images 256)
            ;;
        *) echo "no space is called $space" >&2; return 1 ;;
    esac
    [ -e "$folder/rank/ranking.json" ] && return
    if [ ! -e "$folder/trained" ]; then
        # shellcheck disable=SC2086
        timm-mixpath train -c "$recipe" --cache-images "${options[@]}" $DATA --seed "$seed" --resume auto \
            --model-kwargs "${kwargs[@]}" sum_norm="$norm" sampling="$sampling" \
            --output "$OUTPUT" --experiment "$run" >> "$OUTPUT/$run.log" 2>&1 || return 1
        touch "$folder/trained"
    fi
    timm-mixpath rank --checkpoint "$folder/last.pth.tar" --table "$table" "${archs[@]}" \
        "${images[@]}" --batch-size 250 --output "$folder/rank" > "$folder/rank.log" 2>&1 ||
        return 1
    echo "$run done"
}
export -f one

mkdir -p "$OUTPUT"
{
    for seed in 0 1 2; do
        for space in ${SPACES:-nb201 nb101}; do
            for norm in sbn bn none; do echo "$space $norm paths $seed"; done
        done
        [[ " ${SPACES:-nb201} " != *" nb201 "* ]] || echo "nb201 sbn fair $seed"
    done
} | xargs -P "$PROCESSES" -L 1 bash -c 'one "$@" || echo "$* failed, see its log in $OUTPUT" >&2' _
