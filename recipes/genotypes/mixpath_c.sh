#!/usr/bin/env bash
# Searches mixpath_c on all of CIFAR-10, and compares the choice with chance: what is done is skipped, what was cut off
# goes on.
#
#   recipes/genotypes/mixpath_c.sh OUTPUT [DATA OPTIONS of timm-mixpath train ...]
#
# PROCESSES of one thread (OMP_NUM_THREADS), 1 by default, share the work. With torchvision's CIFAR-10, for example:
#
#   PROCESSES=2 recipes/genotypes/mixpath_c.sh output --dataset torch/cifar10 --dataset-download --data-dir data
#
# An S1 supernet of a quarter of the width, 10 epochs of the images that are not held out; 400 evaluations; and from
# scratch, 2 epochs of all images each, the choice and three random archs of its multiply-adds (chance/table.csv).
set -euo pipefail
: "${1:?usage: mixpath_c.sh OUTPUT [DATA OPTIONS]}"
output=$1
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
processes=${PROCESSES:-1}
recipe=s1_supernet_cifar10_cpu epochs=${EPOCHS:-10} generations=${GENERATIONS:-17} chance_epochs=${CHANCE_EPOCHS:-2}

mixpath() {
    if [ "$processes" = 1 ]; then timm-mixpath "$@"; return; fi
    torchrun --standalone --nproc_per_node="$processes" -m timm_mixpath.cli "$@"
}

# As many images per step, whatever the number of processes
train=(-c "$recipe" --cache-images --cpu-kernels -b $((96 / processes)) "$@")
mixpath train "${train[@]}" --epochs "$epochs" --val-interval "$epochs" --output "$output" --experiment s1_supernet \
    --resume auto
mixpath search --checkpoint "$output/s1_supernet/last.pth.tar" --objectives error macs --num-images 1000 \
    --recalibration-images 256 --population 60 --offspring 20 --generations "$generations" --seed 0 -b 100 \
    --output "$output/search_c"

# The choice, and three random archs of its cost
[ -e "$output/chance.txt" ] || python - "$output" <<'P'
import json
import os
import sys

from timm_mixpath.analysis.arch_lists import draw_archs

output = sys.argv[1]
with open(f'{output}/search_c/front.json') as f:
    (chosen,) = [entry for entry in json.load(f)['front'] if entry['chosen']]
macs = (0.99 * chosen['macs'], 1.01 * chosen['macs'])
# With another seed than that of the search, whose generation 0 is drawn in the same way
drawn = draw_archs('mixpath_s1', 4, seed=1, macs=macs, num_classes=10, width_mult=0.25)
with open(f'{output}/chance.whole', 'w') as f:
    print(chosen['arch'], *[arch for arch in drawn if arch != chosen['arch']][:3], sep='\n', file=f)
os.replace(f'{output}/chance.whole', f'{output}/chance.txt')
P
mixpath table --archs "$output/chance.txt" --table-dir "$output/chance" -c "$recipe" --model mixpath_s1 \
    --model-kwargs width_mult=0.25 --cache-images --cpu-kernels --epochs "$chance_epochs" \
    --val-interval "$chance_epochs" --seed 0 "$@"
cat "$output/chance/table.csv"
