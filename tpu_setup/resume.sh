#!/usr/bin/env bash
# Train to the end on spot slices: whenever the slice is taken away, ask for another one and go on from the last checkpoint.
#
#   tpu_setup/resume.sh --zone us-west4-a --type v5litepod-16 --mount 10.0.0.2:/share \
#       -- train.py --config configs/ranker.py:qwen3_0_6b --workdir /mnt/jaxsearch/runs/ranker --checkpoint.every 200
#
# Ends with the command's success, when it fails on a slice that is still there (a fault of its own), or after --tries tries. Exit codes
# 75 to 77 (saved at SIGTERM, stalled, a process lost) are no fault of its own: it is started again on the same slice.
# The workdir must outlive the slice: a folder of the share (--mount), below /mnt/jaxsearch. The slice is deleted at the end, but never
# because create.sh or install.sh refuses its options (status 2).
#
# Options:
#   --type TYPE          as in create.sh
#   --runtime VERSION    as in create.sh
#   --mount HOST:/SHARE  as in install.sh
#   --on-demand          not spot
#   --tries N            slices to ask for at most (default 20)

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

TYPE='' RUNTIME=() MOUNT=() TERMS=(--spot) TRIES=20
parse_common "$@"
set -- "${ARGS[@]}"
while (($#)); do
  case $1 in
    --type) TYPE=$(value "$@"); shift 2 ;;
    --runtime) RUNTIME=(--runtime "$(value "$@")"); shift 2 ;;
    --mount) MOUNT=(--mount "$(value "$@")"); shift 2 ;;
    --on-demand) TERMS=(); shift ;;
    --tries) TRIES=$(value "$@"); shift 2 ;;
    --) shift; break ;;
    *) fail "unknown option $1 (put -- before the command; --help lists the options)" ;;
  esac
done
need_zone
[[ -n $TYPE ]] || fail "--type is missing: name the accelerator type, such as v5litepod-16"
[[ $TRIES =~ ^[1-9][0-9]*$ ]] || fail "--tries is $TRIES: give a whole number of at least 1"
(($#)) || fail "no command: give it behind --, such as -- train.py --config ... --workdir ..."
before=''
for word in "$@"; do
  if [[ $before == --workdir || $word == --workdir=* ]]; then
    workdir=${word#--workdir=}
    [[ $workdir == /mnt/jaxsearch/* ]] || fail "--workdir is $workdir, which is lost with the slice: give a folder below /mnt/jaxsearch, and --mount"
    ((${#MOUNT[@]})) || fail "--workdir is $workdir, but no share is mounted there: give --mount HOST:/SHARE"
  fi
  before=$word
done

common=(--name "$NAME" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
if ((DRY_RUN)); then
  common+=(--dry-run)
fi
create=("$HERE/create.sh" "${common[@]}" --type "$TYPE" "${RUNTIME[@]}" "${TERMS[@]}")
install=("$HERE/install.sh" "${common[@]}" "${MOUNT[@]}")
# Options that they refuse end here, before anything is made or deleted.
"${create[@]}" --dry-run >/dev/null
"${install[@]}" --dry-run >/dev/null

for ((try = 1; try <= TRIES; try++)); do
  echo "slice $try of at most $TRIES" >&2
  status=0
  { "${create[@]}" && "${install[@]}"; } || status=$?
  ((status != 2)) || fail "an option was refused, see above: nothing was deleted"
  if ((!status)); then
    status=75
    while ((status >= 75 && status <= 77 && try <= TRIES)) && { ((DRY_RUN)) || [[ $(state) == ACTIVE ]]; }; do
      status=0
      "$HERE/run.sh" "${common[@]}" --foreground -- "$@" || status=$?
      if ((status >= 75 && status <= 77)); then
        try=$((try + 1))
      fi
    done
    if ((!DRY_RUN && status && (status < 75 || status > 77))) && [[ $(state) == ACTIVE ]]; then
      echo "the command failed with status $status on a slice that is still there: look at logs.sh, then start again" >&2
      exit "$status"
    fi
    if ((!status)); then
      ((!DRY_RUN)) || echo "if the slice is taken away before the command's end: deleted, and all of this again" >&2
      "$HERE/delete.sh" "${common[@]}"
      exit 0
    fi
  fi
  "$HERE/delete.sh" "${common[@]}" || true
done
echo "no slice lasted to the end in $TRIES tries" >&2
exit 1
