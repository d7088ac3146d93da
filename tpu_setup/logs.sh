#!/usr/bin/env bash
# Show what the workers say.
#
#   tpu_setup/logs.sh --zone us-west4-a --worker 0 --follow
#
# Options:
#   --worker N         one worker, or all (default all)
#   --follow           go on showing new lines (of one worker)
#   --lines N          last lines (default 50)
#   --fetch FOLDER     copy a worker's whole log to FOLDER/N.log instead (worker 0 without --worker)

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

WORKER=all FOLLOW='' LINES=50 FETCH=''
parse_common "$@"
set -- "${ARGS[@]}"
while (($#)); do
  case $1 in
    --worker) WORKER=$(value "$@"); shift 2 ;;
    --follow) FOLLOW=' -F'; shift ;;
    --lines) LINES=$(value "$@"); shift 2 ;;
    --fetch) FETCH=$(value "$@"); shift 2 ;;
    *) fail "unknown option $1 (--help lists them)" ;;
  esac
done
need_zone
[[ $WORKER =~ ^(all|[0-9]+)$ ]] || fail "--worker is $WORKER: give the number of a worker, or all"
[[ $LINES =~ ^[0-9]+$ ]] || fail "--lines is $LINES: give a whole number"
if [[ -n $FOLLOW && $WORKER == all ]]; then
  fail "--follow shows one worker: add --worker 0"
fi
if [[ -n $FETCH ]]; then
  [[ $WORKER != all ]] || WORKER=0
  run mkdir -p "$FETCH"
  tpu tpu-vm scp "$NAME:jaxsearch.log" "$FETCH/$WORKER.log" --worker="$WORKER"
else
  on_workers "tail -n $LINES$FOLLOW ~/jaxsearch.log"
fi
