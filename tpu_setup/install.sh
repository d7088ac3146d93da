#!/usr/bin/env bash
# Put this checkout on every worker of the slice and install it there.
#
#   tpu_setup/install.sh --zone us-west4-a --mount 10.0.0.2:/share
#
# What is committed is sent (git archive HEAD), so that every worker has the same code; the trainer checks that too.
#
# Options:
#   --mount HOST:/SHARE  an NFS share (Filestore) that every worker sees as /mnt/jaxsearch: data, checkpoints, models

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

MOUNT=''
parse_common "$@"
set -- "${ARGS[@]}"
while (($#)); do
  case $1 in
    --mount) MOUNT=$(value "$@"); shift 2 ;;
    *) fail "unknown option $1 (--help lists them)" ;;
  esac
done
need_zone
if [[ -n $MOUNT && ! $MOUNT =~ ^[^/[:space:]]+:/([^/].*)?$ ]]; then
  fail "--mount is $MOUNT: give HOST:/SHARE, such as 10.0.0.2:/share"
fi

# From here on status 2 would be a worker's, and for resume.sh it means bad options.
trap 'status=$?; ((status != 2)) || exit 1' EXIT

archive=/tmp/jaxsearch-$NAME.tar.gz
run git -C "$HERE/.." archive --format tar.gz --output "$archive" HEAD
tpu tpu-vm scp "$archive" "$NAME:/tmp/jaxsearch.tar.gz" --worker=all
if [[ -n $MOUNT ]]; then
  on_workers "sudo apt-get update -q && sudo apt-get install -y -q nfs-common && sudo mkdir -p /mnt/jaxsearch && (mountpoint -q /mnt/jaxsearch || sudo mount -t nfs $(quoted "$MOUNT") /mnt/jaxsearch)"
fi
# The images come with Python 3.10; uv brings a newer one.
on_workers "rm -rf ~/jaxsearch && mkdir ~/jaxsearch && tar xzf /tmp/jaxsearch.tar.gz -C ~/jaxsearch && cd ~/jaxsearch && python3 -m pip install -q --user uv && ~/.local/bin/uv venv -q --python 3.12 .venv && ~/.local/bin/uv pip install -q -c constraints.txt -e '.[tpu]'"
# Every worker must start this one, or it would wait for the others.
on_workers "cd ~/jaxsearch && .venv/bin/python -c 'import jax; jax.distributed.initialize(); print(jax.process_index(), jax.local_device_count(), jax.device_count())'"
