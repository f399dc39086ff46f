#!/usr/bin/env bash
# Does a supernet that starts from nothing rank archs of equal cost? nano on CIFAR-10 at 16x16 pixels. What is done is
# skipped, what was cut off goes on.
#
#   recipes/ranking/nano.sh OUTPUT JOBS [DATA OPTIONS of timm-mixpath train ...]
#
# JOBS is all, or some of these in quotes: table-band, the truth, three epochs of each of 40 archs of nearly equal
# multiply-adds, two seeds; table-random, the same for 20 random archs, one seed; and RUN-SEED, a supernet, sbn or bn
# (sums of up to 2 paths), m3 or bn3 (up to 3), trained for 12 epochs and ranked after some of them, with the tables
# that are there. Not in all: long-SEED, sbn for 36 epochs, ranked after 12, 24 and 36 of them, and kd-SEED, sbn with a
# teacher, the packaged nano trained for 12 epochs of these images, which the first of these jobs makes (so they are
# not begun side by side). PROCESSES of one thread (OMP_NUM_THREADS), 1 by default, share the trainings. For example, with
# torchvision's CIFAR-10:
#
#   recipes/ranking/nano.sh output/rank_nano all --dataset torch/cifar10 --dataset-download --data-dir data
#   python recipes/ranking/equal_cost.py output/rank_nano recipes/ranking/nano --images 2000 --recalibration 512
set -euo pipefail
: "${2:?usage: nano.sh OUTPUT JOBS [DATA OPTIONS]}"
export OUTPUT=$1 jobs=$2
shift 2
export DATA="$*" RECIPES OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
RECIPES=$(cd "$(dirname "$0")/.." && pwd)
processes=${PROCESSES:-1}
[ "$jobs" != all ] || jobs="table-band table-random $(echo {sbn,bn,m3,bn3}-{0,1,2})"

mkdir -p "$OUTPUT"
[ -e "$OUTPUT/band.txt" ] || python - "$OUTPUT" <<'P'
import os
import sys

from timm_mixpath.analysis.arch_lists import draw_archs

output = sys.argv[1]
band = draw_archs('mixpath_nano', 40, seed=1, macs=(3.75e6, 3.85e6), input_size=(3, 16, 16), num_classes=10)
for name, archs in ('random', draw_archs('mixpath_nano', 20)), ('band', band):
    with open(f'{output}/{name}.whole', 'w') as f:
        print(*archs, sep='\n', file=f)
    os.replace(f'{output}/{name}.whole', f'{output}/{name}.txt')
P

teacher() {
    local folder=$OUTPUT/teacher
    [ ! -e "$folder/model" ] || return 0
    # shellcheck disable=SC2086
    timm-mixpath train -c "$RECIPES/nano_cifar10.yaml" --input-size 3 16 16 --epochs 12 --val-interval 12 \
        --cache-images --cpu-kernels --search-holdout 0.1 $DATA --output "$OUTPUT" --experiment teacher \
        --resume auto >> "$OUTPUT/teacher.log" 2>&1 || return 1
    timm-mixpath export --checkpoint "$folder/last.pth.tar" --output "$folder/model" >> "$OUTPUT/teacher.log" 2>&1
}

one() {
    local run=${1%-*} seed=${1#*-} folder=$OUTPUT/$1 kwargs options=() length=12 after='3 6 12' epochs table
    local ranking
    case $run in
        sbn) kwargs=(m=2) ;;
        long) kwargs=(m=2) length=36 after='12 24 36' ;;
        kd)
            kwargs=(m=2)
            teacher || return 1
            options=(--kd-model-name "local-dir:$OUTPUT/teacher/model")
            ;;
        bn) kwargs=(m=2 sum_norm=bn) ;;
        m3) kwargs=(m=3) ;;
        bn3) kwargs=(m=3 sum_norm=bn) ;;
        *) echo "no job is called $1" >&2; return 1 ;;
    esac
    if [ ! -e "$folder/trained" ]; then
        # shellcheck disable=SC2086
        timm-mixpath train -c "$RECIPES/nano_supernet_cifar10.yaml" --input-size 3 16 16 \
            --epochs "$length" --cache-images --cpu-kernels $DATA --seed "$seed" --model-kwargs "${kwargs[@]}" \
            --checkpoint-hist 99 "${options[@]}" --output "$OUTPUT" --experiment "$1" --resume auto >> "$OUTPUT/$1.log" 2>&1 || return 1
        touch "$folder/trained"
    fi
    for table in band random; do
        if [ ! -e "$OUTPUT/table-$table/whole" ]; then
            [ "$table" = random ] && continue
            echo "the job table-$table has to come first" >&2
            return 1
        fi
        for epochs in $after; do
            ranking=$OUTPUT/rank-$table-$1-$epochs
            [ ! -e "$ranking/ranking.json" ] || continue
            [ "$table" = band ] || [ "$epochs" = "$length" ] || continue
            timm-mixpath rank --checkpoint "$folder/checkpoint-$((epochs - 1)).pth.tar" --top-k 5 --num-images 2000 \
                --table "$OUTPUT/table-$table/table.csv" --recalibration-images 512 --batch-size 250 \
                --output "$ranking" >> "$OUTPUT/$1.log" 2>&1 || return 1
        done
    done
    echo "$1 done"
}
export -f one teacher

supernets=()
for job in $jobs; do
    case $job in
        table-band | table-random)
            seeds=(0) mixpath=(timm-mixpath)
            [ "$job" = table-random ] || seeds=(0 1)
            [ "$processes" = 1 ] || mixpath=(torchrun --nproc-per-node "$processes" -m timm_mixpath.cli)
            # shellcheck disable=SC2086
            "${mixpath[@]}" table -c "$RECIPES/nano_cifar10.yaml" --table-dir "$OUTPUT/$job" \
                --archs "$OUTPUT/${job#*-}.txt" --seeds "${seeds[@]}" --drop-checkpoints --model mixpath_nano \
                --input-size 3 16 16 --epochs 3 --cache-images --cpu-kernels --search-holdout 0.1 $DATA
            touch "$OUTPUT/$job/whole"
            ;;
        *) supernets+=("$job") ;;
    esac
done
[ ${#supernets[@]} -eq 0 ] || printf '%s\n' "${supernets[@]}" | xargs -P "$processes" -I {} bash -c \
    'one "$1" || { echo "$1 failed, see its log in $OUTPUT" >&2; exit 1; }' _ {}
