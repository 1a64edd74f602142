#!/usr/bin/env bash
# Sets up, then runs every check: lint, format, types, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SECONDS=0
bash launch/setup.sh

export PATH="$PWD/.venv/bin:$PATH"
export PYTHONNOUSERSITE=1 WANDB_MODE=offline WANDB_SILENT=true HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
# Most distributed tests have two ranks.
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}"
nvidia-smi -L >/dev/null 2>&1 || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"

python -m ruff check .
python -m ruff format --check .
python -m mypy
# Half of a core waits for ranks and machines to end.
python -m pytest --numprocesses "$((cores < 4 ? cores : 4))" --dist loadfile --no-loadscope-reorder "$@"
printf 'test: all passed in %d min %d s\n' $((SECONDS / 60)) $((SECONDS % 60))
