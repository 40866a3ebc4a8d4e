#!/usr/bin/env bash
# Whether and how fast nvcoll works on all GPUs of this host; logs and figures go to a folder.
#
#   tests/gpu/host.sh FOLDER [--gpus N] [--parts compile,tests,soak,...] [--dtypes float32,bfloat16] [--seconds 60]
#                     [--deadline SECONDS]
#
#   compile  the kernels of soak, nodes, bench, eager and tune, on all cores: each of these would do so one by one
#   tests    all GPU tests
#   soak     random calls of every algorithm, each result checked, with one rank a GPU and with two
#   nodes    the same with the ranks divided into nodes of 1, 2 and 4, which reach each other by NVSHMEM's puts
#   bench    every algorithm, 8 B to 256 MiB, in graphs, beside NCCL and symmetric memory
#   eager    the same as calls of the host, fewer sizes
#   tune     rules for this host, one file for each of the datatypes: rules are for all, so choose one of the files
#
# Every part goes on after a failure; exit status 1 if any failed, or was not run since the time was up.
# --seconds: of each soak. --deadline: of everything. --gpus: only the first N, but for the tests. Multicast stays off.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
usage() { sed -n '2,/^set /{/^#/p}' "${BASH_SOURCE[0]}" >&2 && exit 2; }

[[ $# -ge 1 && $1 != -* ]] || usage
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
shift
known=compile,tests,soak,nodes,bench,eager,tune
gpus=$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' | wc -l) parts=$known
dtypes=float32,bfloat16 seconds=60 deadline=86400 first=
while (($#)); do
    case $1 in
        --gpus) gpus=$2 first=$(seq -s, 0 $((gpus - 1))) ;;
        --parts) parts=$2 ;;
        --dtypes) dtypes=$2 ;;
        --seconds) seconds=$2 ;;
        --deadline) deadline=$2 ;;
        *) usage ;;
    esac
    shift 2 || usage
done
((gpus >= 2)) || { echo "host: needs two GPUs, there are $gpus" >&2 && exit 2; }
for part in ${parts//,/ }; do
    [[ ,$known, == *,$part,* ]] || { echo "host: there is no part $part; there are $known" >&2 && exit 2; }
done

export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} NVCOLL_TIMEOUT=${NVCOLL_TIMEOUT:-30}
export NVCOLL_BACKEND=nvshmem NVSHMEM_DISABLE_NVLS=1 NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1
failed=() child=
# What still runs would keep the GPUs from whoever comes next; `timeout` passes the signal on to all that it started.
trap '[[ -z $child ]] || { kill "$child" && wait "$child"; }' EXIT
trap 'exit 143' TERM INT

try() { # try SECONDS NAME COMMAND...: run it with a deadline, keep what it says, show its end
    local limit=$1 name=$2 before=$SECONDS left=$((deadline - SECONDS)) status
    shift 2
    if ((left < 30)); then
        failed+=("$name (not run)")
        echo "== $name: not run, the time is up"
        return
    fi
    timeout -k 5 $((limit < left - 6 ? limit : left - 6)) "$@" </dev/null >"$out/$name.log" 2>&1 &
    child=$!
    wait "$child"
    status=$?
    child=
    ((status == 0)) || failed+=("$name")
    printf '== %s: exit status %d, %d s\n' "$name" "$status" $((SECONDS - before))
    grep -v '^\s*$' "$out/$name.log" | tail -n "${SHOW:-3}" | cut -c1-300
}
wanted() { [[ ,$parts, == *,$1,* ]]; }
soak() { # soak NAME RANKS: both parts of the soak
    local calls=(--graph-calls 100000)
    # The kernels of ranks that share a GPU take turns, milliseconds each.
    (($2 <= gpus)) || calls=(--graph-calls 2000 --graph-size 50)
    try $((3 * seconds + 120)) "$1" nvcoll run -n "$2" -- \
        python3 -m tests.gpu.soak "${calls[@]}" --calls 2000 --seconds "$seconds"
}
bench() { # bench NAME OPTIONS...: a table, and the fastest of every size
    local name=$1
    shift
    rm -f "$out/$name.json"
    SHOW=1 try 500 "$name" nvcoll bench allreduce -n "$gpus" --time 0.05 --algorithm all \
        --compare nccl,nccl_symmetric,symm_mem --json "$out/$name.json" "$@"
    [[ ! -e $out/$name.json ]] || python3 -m tests.gpu.fastest "$out/$name.json" || failed+=("the table of $name")
}

if wanted compile; then
    for reach in near far; do try 300 "compile-$reach" python3 -m tests.gpu.soak --compile "$reach" --largest 64M; done
fi
! wanted tests || SHOW=12 try 900 tests env -u NVCOLL_BACKEND -u NVCOLL_TIMEOUT -u PYTHONPATH \
    python3 -m pytest -q -m gpu tests -p no:cacheprovider --timeout 150
[[ -z $first ]] || export CUDA_VISIBLE_DEVICES=$first
if wanted soak; then
    soak soak "$gpus"
    soak soak-two-a-gpu $((2 * gpus))
fi
if wanted nodes; then
    for each in 1 2 4; do
        NVCOLL_RANKS_PER_NODE=$each soak "nodes-of-$each" $((each < gpus ? gpus : 2 * gpus))
    done
fi
for dtype in ${dtypes//,/ }; do
    if wanted bench; then
        bench "bench-small-$dtype" --dtype "$dtype" --max 8K --factor 4
        bench "bench-large-$dtype" --dtype "$dtype" --min 16K --max 256M --factor 4
    fi
    ! wanted eager || bench "eager-$dtype" --dtype "$dtype" --max 256M --factor 32 --eager
    ! wanted tune || SHOW=20 try 500 "tune-$dtype" nvcoll tune allreduce -n "$gpus" --dtype "$dtype" \
        --min 16 --max 256M --factor 4 --time 0.05 --output "$out/rules-$dtype.json"
done
echo "host: $gpus GPUs, $( ((${#failed[@]})) && { IFS=,; echo "failed: ${failed[*]}"; } || echo all right)"
((!${#failed[@]}))
