#!/usr/bin/env bash
# Ask for a TPU slice as a queued resource, and wait for it.
#
#   tpu_setup/create.sh --zone us-west4-a --type v5litepod-16 --spot
#
# Options:
#   --type TYPE        v5litepod-N, v6e-N, v4-N, v5p-N. v4 and v5p count cores, two to a chip: v5p-128 is the topology 4x4x4
#   --spot             cheaper, and taken away at any time (resume.sh goes on); default: on demand
#   --reserved         from a reservation of the project
#   --runtime VERSION  image of the VMs; default: Google's base image for the type
#   --no-wait          do not wait until the slice is there

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

TYPE='' RUNTIME='' WAIT=1 TERMS=()
parse_common "$@"
set -- "${ARGS[@]}"
while (($#)); do
  case $1 in
    --type) TYPE=$(value "$@"); shift 2 ;;
    --runtime) RUNTIME=$(value "$@"); shift 2 ;;
    --spot | --reserved) TERMS+=("$1"); shift ;;
    --no-wait) WAIT=0; shift ;;
    *) fail "unknown option $1 (--help lists them)" ;;
  esac
done
need_zone
[[ -n $TYPE ]] || fail "--type is missing: name the accelerator type, such as v5litepod-16"
((${#TERMS[@]} < 2)) || fail "--spot and --reserved exclude each other"
if [[ -z $RUNTIME ]]; then
  case $TYPE in
    v4-*) RUNTIME=tpu-ubuntu2204-base ;;
    v5litepod-*) RUNTIME=v2-alpha-tpuv5-lite ;;
    v5p-*) RUNTIME=v2-alpha-tpuv5 ;;
    v6e-*) RUNTIME=v2-alpha-tpuv6e ;;
    *) fail "no image is known for type $TYPE: give v5litepod-N, v6e-N, v4-N, v5p-N, or --runtime" ;;
  esac
fi
[[ $TYPE =~ ^[a-z0-9]+-[1-9][0-9]*$ ]] || fail "--type is $TYPE: give a family and a whole number, such as v5litepod-16"

tpu queued-resources create "$NAME" --node-id "$NAME" --accelerator-type "$TYPE" --runtime-version "$RUNTIME" "${TERMS[@]}"
((WAIT)) || exit 0
if ((DRY_RUN)); then
  echo "$(describe)  # every 30 s until it says ACTIVE; FAILED, SUSPENDED or no answer: ends with status 1"
  exit 0
fi
while true; do
  now=$(state)
  echo "$(date +%T) $NAME is $now" >&2
  case $now in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED | ABSENT) exit 1 ;;
  esac
  sleep 30
done
