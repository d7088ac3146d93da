#!/usr/bin/env bash
# Run one command on every worker of the slice: the processes find each other (jaxsearch/training/distributed.py).
#
#   tpu_setup/run.sh --zone us-west4-a -- train.py --config configs/ranker.py:qwen3_0_6b --workdir /mnt/jaxsearch/runs/ranker
#
# The command is a script of the checkout with its options. It goes on when this terminal is closed; logs.sh shows what it says.
#
# Options:
#   --foreground       wait for the end, with the command's own exit status

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

FOREGROUND=0
parse_common "$@"
set -- "${ARGS[@]}"
while (($#)); do
  case $1 in
    --foreground) FOREGROUND=1; shift ;;
    --) shift; break ;;
    *) fail "unknown option $1 (put -- before the command; --help lists the options)" ;;
  esac
done
need_zone
(($#)) || fail "no command: give it behind --, such as -- train.py --config ... --workdir ..."

command="cd ~/jaxsearch && . tpu_setup/env.sh && export JAXSEARCH_PROCESSES=auto && .venv/bin/python $(quoted "$@")"
if ((FOREGROUND)); then
  on_workers "set -o pipefail; ($command) 2>&1 | tee ~/jaxsearch.log"
else
  on_workers "nohup setsid bash -c $(quoted "$command; echo \"exit status \$?\"") > ~/jaxsearch.log 2>&1 < /dev/null &"
fi
