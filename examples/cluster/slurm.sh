#!/bin/bash
# One process on each of four hosts merges its share: sbatch slurm.sh RECIPE OUT
# OUT must be on a file system that all hosts share; the models must be readable on all of them.
#SBATCH --job-name=merge
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=16G
#SBATCH --time=01:00:00

set -euo pipefail

# A merge to disk is bound by reading and writing: CPUs do it, and GPUs are left to others.
export JAX_PLATFORMS=cpu

# --kill-on-bad-exit: when one process dies, Slurm ends the others at once instead of after JAX's 100 seconds.
srun --kill-on-bad-exit=1 jaxmerge merge "$1" --out "$2" --distributed --memory-budget 4GiB
