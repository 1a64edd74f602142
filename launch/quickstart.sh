#!/usr/bin/env bash
# From nothing to a trained model: environment, real data, a short training run, its report.
# Safe to interrupt and to repeat: each phase goes on from what is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=quickstart
times=()

phase() {
    local name="$1" begin=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@"
    times+=("$(took "$name" $((SECONDS - begin)))")
}

took() { printf '%-8s %3d min %02d s' "$1" $(($2 / 60)) $(($2 % 60)); }

phase setup bash launch/setup.sh
m6=".venv/bin/m6"
phase data "$m6" data fetch

resume=()
if [ -e "runs/$run/recipe.yaml" ]; then
    printf '\nruns/%s exists: going on with it (remove that folder to start over)\n' "$run"
    resume=(--resume)
fi
phase train "$m6" train --recipe launch/recipes/quickstart.yaml --name "$run" "${resume[@]}"
phase report "$m6" report "$run"

printf '\n'
printf '%s\n' "${times[@]}" "$(took total $SECONDS)"
