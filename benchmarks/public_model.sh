#!/usr/bin/env bash
# The protocol on a public chat model of 7 to 8 B, for whoever has one and a GPU to run it on.
#
#   benchmarks/public_model.sh MODEL BUNDLE DATA JUDGE [DIRECTORY]
#
# MODEL      name or directory of the chat model.
# BUNDLE     made for that model from the splits locate, fit, select and calibrate of DATA.
# DATA       the model's own judged responses as JSON lines, with splits; see the README.
# JUDGE      module:function that labels a response, another one than labelled DATA.
# DIRECTORY  where everything is written; default benchmarks/journals/public.
#
# Budgets and seeds are those of benchmarks/protocol.yaml. Expect some hours for the evaluation
# and days for the attacks; each step goes on where it stopped. Prompts that get around the guard
# are kept in refit-first.jsonl, for the refit alone: treat that file as what it is.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,14p' "$0" | cut -c3-; exit 2; }
model=$1 bundle=$2 data=$3 judge=$4 out=${5:-$(dirname "$0")/journals/public}
mkdir -p "$out"
on() { # COMMAND BUNDLE ...
    local command=$1 with=$2
    shift 2
    safe-decode "$command" --model "$model" --bundle "$with" --data "$data" --judge "$judge" \
        --device cuda --dtype bfloat16 --seed 0 "$@"
}

on evaluate "$bundle" --mode both --prefix 32 --prefix 64 --prefix 128 \
    --out "$out/evaluation.json" --html "$out/evaluation.html"
on attack "$bundle" --behaviours "$data" --count 30 \
    --out "$out/attacks.jsonl" --html "$out/attacks.html"
on attack "$bundle" --behaviours "$data" --half first --count 30 --threat T1 --threat T3 \
    --keep-prompts --out "$out/refit-first.jsonl"
on refit "$bundle" --behaviours "$data" --records "$out/refit-first.jsonl" --count 30 \
    --out "$out/refit-bundle"
for which in before after; do
    with=$bundle
    [ $which = after ] && with=$out/refit-bundle
    on attack "$with" --behaviours "$data" --half second --doubled --count 30 \
        --threat T1 --threat T3 --threat T4 --out "$out/refit-$which.jsonl"
done
