# shellcheck shell=bash
# What the other scripts share: the options that each of them takes, and how a command is run or, with --dry-run, printed.

set -euo pipefail

NAME=${TPU_NAME:-jaxsearch}
ZONE=${TPU_ZONE:-}
PROJECT=${TPU_PROJECT:-}
DRY_RUN=0
ARGS=()

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export HERE

# Print the comment at the top of the script that was started.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  cat <<'TEXT'
Common options:
  --name NAME        the queued resource and its TPU VM (TPU_NAME; default jaxsearch)
  --zone ZONE        required (TPU_ZONE)
  --project PROJECT  default: gcloud's own (TPU_PROJECT)
  --dry-run          print the commands, run none
TEXT
}

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# The value of an option, or an end that names the option. A forgotten value must not swallow the next option: that may be --dry-run.
value() {
  [[ $# -ge 2 && -n $2 && $2 != -* ]] || fail "$1 needs a value"
  printf '%s' "$2"
}

# Take the common options; what is left goes to ARGS. Everything behind "--" is left as it is.
parse_common() {
  while (($#)); do
    case $1 in
      --name) NAME=$(value "$@"); shift 2 ;;
      --zone) ZONE=$(value "$@"); shift 2 ;;
      --project) PROJECT=$(value "$@"); shift 2 ;;
      --dry-run) DRY_RUN=1; shift ;;
      -h | --help) usage; exit 0 ;;
      --) ARGS+=("$@"); break ;;
      *) ARGS+=("$1"); shift ;;
    esac
  done
}

need_zone() {
  [[ -n $ZONE ]] || fail "--zone is missing: name the zone of the TPU, such as us-west4-a (or set TPU_ZONE)"
}

# Run a command, or print it so that it could be pasted into a shell.
run() {
  if ((DRY_RUN)); then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

tpu() {
  local what=$1
  shift
  run gcloud compute tpus "$what" "$@" --zone "$ZONE" ${PROJECT:+--project "$PROJECT"}
}

# Run a command on every worker of the slice at the same time (or on one: WORKER=0).
on_workers() {
  tpu tpu-vm ssh "$NAME" "--worker=${WORKER:-all}" --command "$1"
}

describe() {
  tpu queued-resources describe "$NAME" --format 'value(state.state)'
}

# The state of the queued resource: ACTIVE, SUSPENDED, ...; ABSENT where there is none.
state() {
  describe 2>/dev/null || echo ABSENT
}

# The words of a command as one line for a remote shell.
quoted() {
  printf '%q ' "$@" | sed 's/ $//'
}
