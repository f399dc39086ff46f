#!/usr/bin/env bash
# Does a warm-started supernet rank archs of equal cost? What is done is skipped, what was cut off goes on.
#
#   recipes/ranking/warm_start.sh IMAGENETTE WARM OUTPUT [JOB ...]
#
# IMAGENETTE holds its 160 px version as train/ and validation/; WARM is the OUTPUT of recipes/warm_start/run.sh, with
# the supernets of its jobs sbn-SEED, bn-SEED and long-0, and the network that they started from. Jobs, all by default:
# table-band, the truth for 40 archs of nearly equal multiply-adds, each trained for an epoch from the weights that the
# supernets started with, two seeds; table-random, the same for 20 random archs, one seed; and
# rank-TABLE-RUN-SEED-EPOCHS[-IMAGES[-RECALIBRATION]], which asks the supernet RUN-SEED as it was after that many epochs
# (0, of sbn: the warm start itself), with 500 images to score and 256 to recalibrate with, or as many as named. Not by
# default: table-long, four epochs of the first 12 of the band, one seed, and rank-band-m3-SEED-5, of supernets of the
# job m3-SEED. All in PROCESSES processes of one thread (OMP_NUM_THREADS), 1 by default. equal_cost.py makes tables and
# figure.
set -euo pipefail
: "${3:?usage: warm_start.sh IMAGENETTE WARM OUTPUT [JOB ...]}"
data=$1 warm=$2 output=$3
shift 3
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ $# -gt 0 ] || set -- table-{band,random} rank-{band,random}-sbn-0-0 rank-{band,random}-{sbn,bn}-{0,1,2}-5 \
    rank-band-{sbn,bn}-{0,1,2}-{1,2} rank-band-long-0-{2,5,8,12} \
    rank-band-sbn-{0,1,2}-5-{100,200,900} rank-band-sbn-0-5-500-{64,1024}
backbone=tf_efficientnet_lite0 mixpath=(timm-mixpath)
[ "${PROCESSES:-1}" = 1 ] || mixpath=(torchrun --nproc-per-node "$PROCESSES" -m timm_mixpath.cli)

mkdir -p "$output"
[ -e "$output/band.txt" ] || python - "$output" "$backbone" <<'P'
import os
import sys

from timm_mixpath.analysis.arch_lists import draw_archs

output, backbone = sys.argv[1:]
of_equal_macs = dict(seed=1, macs=(98.5e6, 101.5e6), input_size=(3, 128, 128))  # with 1000 classes
band = draw_archs('mixpath', 40, backbone=backbone, **of_equal_macs)
for name, archs in ('random', draw_archs('mixpath', 20, backbone=backbone)), ('long', band[:12]), ('band', band):
    with open(f'{output}/{name}.whole', 'w') as f:
        print(*archs, sep='\n', file=f)
    os.replace(f'{output}/{name}.whole', f'{output}/{name}.txt')
P

for job in "$@"; do
    case $job in
        table-band | table-random | table-long)
            name=${job#*-} seeds=(0) epochs=1
            [ "$name" != band ] || seeds=(0 1)
            [ "$name" != long ] || epochs=4
            "${mixpath[@]}" table -c "$here/../warm_start_lite0_imagenette.yaml" --table-dir "$output/$job" \
                --archs "$output/$name.txt" --seeds "${seeds[@]}" --drop-checkpoints --model mixpath \
                --model-kwargs "backbone=$backbone" --pretrained-path "$warm/teacher/model/model.safetensors" \
                --epochs "$epochs" --search-holdout 0.1 --data-dir "$data" --val-split validation --cpu-kernels
            touch "$output/$job/whole"
            ;;
        rank-*-*-*-*)
            IFS=- read -r _ name run seed epochs images recalibration <<< "$job"
            [ ! -e "$output/$job/ranking.json" ] || continue
            [ -e "$output/table-$name/whole" ] || { echo "$job needs the job table-$name first" >&2; exit 2; }
            supernet=(--checkpoint "$warm/$run-$seed/checkpoint-$((epochs - 1)).pth.tar")
            if [ "$epochs" = 0 ]; then
                [ "$run" = sbn ] || { echo "$job: before its first step only sbn can be ranked" >&2; exit 2; }
                [ -e "$output/start.safetensors" ] ||
                    python "$here/../warm_start/start.py" "$warm/teacher/model" "$output/start.safetensors"
                supernet=(--checkpoint "$output/start.safetensors" --config "$warm/$run-$seed/args.yaml")
            fi
            "${mixpath[@]}" rank "${supernet[@]}" --table "$output/table-$name/table.csv" --top-k 5 \
                --num-images "${images:-500}" --recalibration-images "${recalibration:-256}" --data-dir "$data" \
                --output "$output/$job"
            ;;
        *) echo "no job is called $job" >&2; exit 2 ;;
    esac
done
