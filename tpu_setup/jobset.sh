#!/usr/bin/env bash
# The same job on GKE: build the image, push it, and start a JobSet of it.
#
#   tpu_setup/jobset.sh --image us-docker.pkg.dev/PROJECT/REPO/jaxsearch:1 --accelerator tpu-v5-lite-podslice --topology 4x4 --hosts 4 \
#       -- train.py --config configs/ranker.py:qwen3_0_6b --workdir /mnt/jaxsearch/runs/ranker
#
# The cluster needs the JobSet controller, a node pool of that slice, and a ReadWriteMany volume claim for /mnt/jaxsearch.
#
# Options:
#   --image IMAGE        where the image is pushed and pulled from
#   --accelerator NAME   tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice
#   --topology SHAPE     of the slice, such as 4x4
#   --hosts N            its virtual machines: N times --chips are the chips of the topology
#   --chips N            chips of one virtual machine (default 4)
#   --claim NAME         the volume claim (default jaxsearch)
#   --no-build           the image is there already

# The fields are read by name, below.
# shellcheck disable=SC2034
# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"

IMAGE='' ACCELERATOR='' TOPOLOGY='' HOSTS='' CHIPS=4 CLAIM=jaxsearch BUILD=1
parse_common "$@"
set -- "${ARGS[@]}"
while (($#)); do
  case $1 in
    --image) IMAGE=$(value "$@"); shift 2 ;;
    --accelerator) ACCELERATOR=$(value "$@"); shift 2 ;;
    --topology) TOPOLOGY=$(value "$@"); shift 2 ;;
    --hosts) HOSTS=$(value "$@"); shift 2 ;;
    --chips) CHIPS=$(value "$@"); shift 2 ;;
    --claim) CLAIM=$(value "$@"); shift 2 ;;
    --no-build) BUILD=0; shift ;;
    --) shift; break ;;
    *) fail "unknown option $1 (put -- before the command; --help lists the options)" ;;
  esac
done
for name in IMAGE ACCELERATOR TOPOLOGY HOSTS; do
  [[ -n ${!name} ]] || fail "--${name,,} is missing"
done
case $ACCELERATOR in
  tpu-v4-podslice | tpu-v5-lite-podslice | tpu-v5p-slice | tpu-v6e-slice) ;;
  *) fail "--accelerator is $ACCELERATOR: give tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice or tpu-v6e-slice" ;;
esac
[[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "--topology is $TOPOLOGY: give two or three whole numbers, such as 4x4"
for name in HOSTS CHIPS; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "--${name,,} is ${!name}: give a whole number of at least 1"
done
slice=$((${TOPOLOGY//x/*}))
((slice % CHIPS == 0)) || fail "--chips is $CHIPS: the $slice chips of --topology $TOPOLOGY are no multiple of it"
((HOSTS * CHIPS == slice)) || fail "--hosts is $HOSTS: --topology $TOPOLOGY has $slice chips, $CHIPS to a host: give --hosts $((slice / CHIPS))"
(($#)) || fail "no command: give it behind --, such as -- train.py --config ... --workdir ..."

# Fields of jobset.yaml as ${NAME}; the command as a JSON list, which YAML reads.
list=''
for word in "$@"; do
  word=${word//\\/\\\\}
  list+="${list:+, }\"${word//\"/\\\"}\""
done
text=$(<"$HERE/jobset.yaml")
for field in NAME IMAGE ACCELERATOR TOPOLOGY HOSTS CHIPS CLAIM; do
  text=${text//"\${$field}"/"${!field}"}
done
text=${text//"\${COMMAND}"/"[$list]"}

if ((BUILD)); then
  run docker build --tag "$IMAGE" --file "$HERE/Dockerfile" "$HERE/.."
  run docker push "$IMAGE"
fi
if ((DRY_RUN)); then
  echo "kubectl apply --filename - <<'YAML'"
  echo "$text"
  echo YAML
else
  kubectl apply --filename - <<<"$text"
fi
