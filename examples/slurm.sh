#!/usr/bin/env bash
#SBATCH --job-name=convexprune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
# Prune with one task for each GPU; the folder of the result is on a file system that all nodes see.
# sbatch examples/slurm.sh MODEL TEXT OUTPUT [OPTION ...]; submit it again, and it goes on.
set -euo pipefail
model=$1 text=$2 output=$3
shift 3
# With --prefix pruned the ranks talk to each other, and meet here.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
srun --kill-on-bad-exit=0 convexprune prune "$model" --dataset "$text" --output "$output" \
  --executor ranks --threads "$SLURM_CPUS_PER_TASK" --resume "$@"
