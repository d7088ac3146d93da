# shellcheck shell=bash
# Environment of a job on a TPU or GPU worker; `run.sh` and the JobSet load it. Each line says why it is there, and nothing else is set:
# the compiler's defaults (latency hiding, collectives beside matmuls) are right for these programs.

# Lines reach the log when they are written, not when a buffer is full: a job that is killed leaves its last words.
export PYTHONUNBUFFERED=1

# A restarted job finds its compiled programs: an 8B step takes minutes to compile. A local folder, since one shared by
# all workers would be written by all of them.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jaxsearch/xla}

# A segmentation fault or a fatal signal prints Python's stacks.
export PYTHONFAULTHANDLER=1

if [[ ${JAXSEARCH_GPU:-0} == 1 ]]; then
  # JAX takes three quarters of a GPU by default; a job that has the machine for itself can take more. The rest is
  # for NCCL and CUDA, which allocate outside of it.
  export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.9}
fi
