#!/usr/bin/env bash
# Delete the queued resource and its slice; what lies on the workers' disks is lost.
#
#   tpu_setup/delete.sh --zone us-west4-a

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

parse_common "$@"
((${#ARGS[@]} == 0)) || fail "unknown option ${ARGS[0]} (--help lists them)"
need_zone
tpu queued-resources delete "$NAME" --force --quiet
