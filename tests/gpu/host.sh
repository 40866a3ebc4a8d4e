#!/usr/bin/env bash
# Whether and how fast nvcoll works on all GPUs of this host, in one go; logs and figures go to a folder.
#
#   tests/gpu/host.sh FOLDER [--gpus N] [--seconds 60] [--parts tests,soak,nodes,bench,tune]
#
#   tests   the GPU tests
#   soak    random calls of every algorithm, each result checked, with one rank a GPU and with two
#   nodes   the same with the ranks divided into nodes of 1, 2 and 4, which reach each other by NVSHMEM's puts
#   bench   every algorithm, 8 B to 256 MiB, float32 and bfloat16, in graphs and eager, beside NCCL and symmetric memory
#   tune    rules for this host, float32 and bfloat16
#
# Every part goes on after a failure; exit status 1 if any failed. --seconds: of each soak. Multicast stays off.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
usage() { sed -n '2,/^set /{/^#/p}' "${BASH_SOURCE[0]}" >&2 && exit 2; }

[[ $# -ge 1 && $1 != -* ]] || usage
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
gpus=$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' | wc -l) seconds=60 parts=tests,soak,nodes,bench,tune
while (($#)); do
    case $1 in
        --gpus) gpus=$2 ;;
        --seconds) seconds=$2 ;;
        --parts) parts=$2 ;;
        *) usage ;;
    esac
    shift 2 || usage
done
((gpus >= 2)) || { echo "host: needs two GPUs, there are $gpus" >&2 && exit 2; }

export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} NVCOLL_TIMEOUT=${NVCOLL_TIMEOUT:-30}
export NVSHMEM_DISABLE_NVLS=1 NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1
failed=()

try() { # try SECONDS NAME COMMAND...: run it with a deadline, keep what it says, show its end
    local limit=$1 name=$2 before=$SECONDS status
    shift 2
    timeout -k 5 "$limit" "$@" </dev/null >"$out/$name.log" 2>&1
    status=$?
    ((status == 0)) || failed+=("$name")
    printf '== %s: exit status %d, %d s\n' "$name" "$status" $((SECONDS - before))
    grep -v '^\s*$' "$out/$name.log" | tail -n "${SHOW:-3}" | cut -c1-300
}
wanted() { [[ ,$parts, == *,$1,* ]]; }
soak() { # soak NAME RANKS GRAPH-CALLS: both parts of the soak
    try $((3 * seconds + 120)) "$1" env NVCOLL_BACKEND=nvshmem nvcoll run -n "$2" -- \
        python3 -m tests.gpu.soak --graph-calls "$3" --calls 2000 --seconds "$seconds"
}

! wanted tests || SHOW=12 try 900 tests python3 -m pytest -q -m gpu tests/gpu -p no:cacheprovider --timeout 150
if wanted soak; then
    soak soak "$gpus" 100000
    soak soak-two-a-gpu $((2 * gpus)) 2000 # kernels of ranks that share a GPU take turns, milliseconds each
fi
if wanted nodes; then
    for each in 1 2 4; do
        ((each >= gpus)) || NVCOLL_RANKS_PER_NODE=$each soak "nodes-of-$each" "$gpus" 20000
    done
fi
for dtype in float32 bfloat16; do
    if wanted bench; then
        SHOW=40 try 500 "bench-$dtype" nvcoll bench allreduce -n "$gpus" --max 256M --factor 4 --time 0.05 --dtype "$dtype" \
            --algorithm all --compare nccl,nccl_symmetric,symm_mem --json "$out/bench-$dtype.json"
        try 200 "eager-$dtype" nvcoll bench allreduce -n "$gpus" --max 1M --factor 16 --time 0.05 --dtype "$dtype" --eager \
            --json "$out/eager-$dtype.json"
    fi
    ! wanted tune || SHOW=30 try 500 "tune-$dtype" nvcoll tune allreduce -n "$gpus" --max 256M --factor 4 --dtype "$dtype" \
        --output "$out/rules-$dtype.json"
done
echo "host: $gpus GPUs, $( ((${#failed[@]})) && echo "failed: ${failed[*]}" || echo all right)"
((!${#failed[@]}))
