#!/usr/bin/env bash
# Set up the project and fine-tune a small model with the DFT loss, on any machine: bash scripts/quickstart.sh
# It installs the environment in .venv, and then
#     1. makes a small base model from scratch and trains it briefly with plain cross-entropy (--dft_alpha 0), because
#        DFT strengthens what a model half knows and gives next to no gradient to what it doesn't know
#     2. fine-tunes it with the DFT loss under DeepSpeed ZeRO-3, on all GPUs or with 2 processes on CPU
#     3. asks the result a question
# OUT is the output directory; default outputs/quickstart.
set -euo pipefail
if [[ $# -gt 0 ]]; then
    source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
    show_usage "${BASH_SOURCE[0]}"
    [[ "$1" == --help || "$1" == -h ]] && exit 0
    echo "error: quickstart.sh takes no arguments, and got: $*" >&2
    exit 2
fi
here="$(dirname "${BASH_SOURCE[0]}")"
source "$here/setup.sh"
OUT="${OUT:-outputs/quickstart}"
started=$SECONDS
rm -rf "$OUT"/{random,base,model}
mkdir -p "$OUT"
export DS_ACCELERATOR="${DS_ACCELERATOR:-$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}"

echo
echo "== 1/3  The base model: made from scratch, then trained with plain cross-entropy"
python examples/make_tiny_model.py "$OUT/random" --data examples/data
LAUNCHER=python NPROC=1 LOG_DIR="$OUT/logs" bash scripts/train.sh \
    --config examples/base.yaml --model_name_or_path "$OUT/random" --output_dir "$OUT/base"

echo
echo "== 2/3  The main job: DFT fine-tuning under DeepSpeed ZeRO-3"
if [[ "$DS_ACCELERATOR" == cpu ]]; then export NPROC="${NPROC:-2}"; fi
LOG_DIR="$OUT/logs" bash scripts/train.sh \
    --config examples/quickstart.yaml --model_name_or_path "$OUT/base" --output_dir "$OUT/model"

echo
echo "== 3/3  A question to the result"
question="What is the capital of France?"
echo "> $question"
system="You are a helpful assistant who answers in one short sentence."  # as in the training
python scripts/chat.py "$OUT/model" "$question" --system "$system"

cat << END

Finished in $(( SECONDS - started )) s (installation not counted).
  the model      $OUT/model
  the curves     $OUT/model/training_curves.png
  all numbers    $OUT/model/train_log.jsonl
  the data       $OUT/model/data_report.json

Next:
  source .venv/bin/activate
  python scripts/chat.py $OUT/model --system "$system"
                                                                             # talk to it
  python train_dft.py --model_name_or_path $OUT/base --data_files my.jsonl --dry_run True
                                                                             # look at your own data
  MODEL=/path/to/your/model DATA="my.jsonl" OUTPUT_DIR=outputs/mine bash scripts/train.sh
                                                                             # train on it
END
