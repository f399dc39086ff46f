#!/usr/bin/env bash
# Does a warm-started supernet rank archs of equal cost? What is done is skipped, what was cut off goes on.
#
#   recipes/ranking/warm_start.sh IMAGENETTE WARM OUTPUT [JOB ...]
#
# IMAGENETTE holds its 160 px version as train/ and validation/; WARM is the OUTPUT of recipes/warm_start/run.sh, with
# the supernets of its jobs sbn-SEED and bn-SEED, and the network that they started from. Jobs, all by default: table,
# the ground truth, which trains 20 random archs and 40 of 100 M multiply-adds for an epoch each from the same weights,
# with two seeds; and rank-RUN-EPOCHS, which asks the supernet RUN as it was after that many epochs. Both in PROCESSES
# processes of one thread (OMP_NUM_THREADS), 1 by default.
set -euo pipefail
: "${3:?usage: warm_start.sh IMAGENETTE WARM OUTPUT [JOB ...]}"
data=$1 warm=$2 output=$3
shift 3
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ $# -gt 0 ] || set -- table rank-{sbn,bn}-{0,1,2}-{1,2,5}
backbone=tf_efficientnet_lite0 mixpath=(timm-mixpath)
[ "${PROCESSES:-1}" = 1 ] || mixpath=(torchrun --nproc-per-node "$PROCESSES" -m timm_mixpath.cli)

mkdir -p "$output"
[ -e "$output/archs.txt" ] || python - "$output/archs.txt" "$backbone" <<'P'
import os
import sys

from timm_mixpath.analysis.arch_lists import draw_archs

path, backbone = sys.argv[1:]
archs = draw_archs('mixpath', 20, backbone=backbone)
archs += draw_archs('mixpath', 40, seed=1, backbone=backbone, macs=(98.5e6, 101.5e6), input_size=(3, 128, 128))
with open(f'{path}.whole', 'w') as f:
    print(*dict.fromkeys(archs), sep='\n', file=f)
os.replace(f'{path}.whole', path)
P

for job in "$@"; do
    case $job in
        table)
            "${mixpath[@]}" table -c "$here/../warm_start_lite0_imagenette.yaml" --table-dir "$output/table" \
                --archs "$output/archs.txt" --seeds 0 1 --drop-checkpoints --model mixpath \
                --model-kwargs "backbone=$backbone" --pretrained-path "$warm/teacher/model/model.safetensors" \
                --epochs 1 --search-holdout 0.1 --data-dir "$data" --val-split validation --cpu-kernels
            ;;
        rank-*-*-*)
            IFS=- read -r _ norm seed epochs <<< "$job"
            "${mixpath[@]}" rank --checkpoint "$warm/$norm-$seed/checkpoint-$((epochs - 1)).pth.tar" \
                --table "$output/table/table.csv" --band macs 3% --num-images 500 --recalibration-images 256 \
                --top-k 5 --data-dir "$data" --output "$output/$job"
            ;;
        *) echo "no job is called $job" >&2; exit 2 ;;
    esac
done
