#!/usr/bin/env bash
# Small calls of every algorithm under compute-sanitizer, on a host with GPUs. Exit status 1 if a tool finds anything or
# a result is wrong, 2 if nothing could be tried.
#
#   tests/gpu/sanitize.sh [--form auto|threads|processes] [--tools memcheck,synccheck,racecheck] [--ranks 2]
#                         [--kinds 2] [--algorithms ring,nvrar/simple] [--seconds 300] [--gpu N] [-- TOOL'S OPTIONS]
#
# Kernels of ranks wait for each other, and the tool may hold a launch back until the launch before it has ended: its
# manual says that launches are not made sequential unless --force-blocking-launches asks for it, and others have seen
# kernels hang under it that wait for the host. So there are two forms:
#   threads    ranks emulated on one GPU, in one process under one sanitizer. Kernels of that process must run side by
#              side; where they are held back, they give up after NVCOLL_TIMEOUT, and this form is of no use.
#   processes  a process and a sanitizer of its own for each rank, on GPUs of their own or sharing one (--gpu 0). A
#              process runs one kernel at a time, so nothing is held back, even with -- --force-blocking-launches.
#   auto       threads if a single call gets through, else processes.
# racecheck looks at shared memory, of which these kernels use none (tests/device/cuda/test_kernels.py checks that), so
# it gets one call only: to see that it has nothing to say. What races in global memory, no tool finds.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2

form=auto tools=memcheck,synccheck,racecheck ranks=2 kinds=2 seconds=300 chosen=() more=()
while (($#)); do
    case $1 in
        --form) form=$2 ;;
        --tools) tools=$2 ;;
        --ranks) ranks=$2 ;;
        --kinds) kinds=$2 ;;
        --seconds) seconds=$2 ;;
        --algorithms) chosen=(--algorithms "$2") ;;
        --gpu) export NVCOLL_DEVICE=$2 ;;
        --) shift && more=("$@") && break ;;
        *) sed -n '2,/^set /{/^#/p}' "$0" >&2 && exit 2 ;;
    esac
    shift 2 || exit 2
done
[[ $form =~ ^(auto|threads|processes)$ ]] || { echo "sanitize: there is no form $form" >&2 && exit 2; }

sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) ||
    { echo "sanitize: compute-sanitizer is missing: it comes with the CUDA toolkit" >&2 && exit 2; }
python=$(python3 -c 'import sys; print(sys.executable)') || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} NVCOLL_BACKEND=nvshmem NVCOLL_HEAP=${NVCOLL_HEAP:-256M}
export NVCOLL_TIMEOUT=${NVCOLL_TIMEOUT:-120} CUDA_DEVICE_MAX_CONNECTIONS=32 NVSHMEM_DISABLE_NVLS=1
work=$(mktemp -d)
failed=0
"$sanitizer" --version | grep -i version

start() { # start FORM ARGUMENTS... [@ TOOL]: the program in a form, each process under the tool
    local what=$1 under=() arguments=()
    shift
    while (($#)) && [[ $1 != @ ]]; do arguments+=("$1") && shift; done
    if ((!$#)); then
        arguments+=(--compile)
    else
        under=("$sanitizer" --tool "$2" --error-exitcode 86 --target-processes application-only --launch-timeout 120)
        # API errors: asking what a pointer is, and whether an event has come, fails on purpose.
        [[ $2 != memcheck ]] || under+=(--report-api-errors no --check-device-heap no)
        under+=("${more[@]}")
    fi
    if [[ $what == threads ]]; then
        timeout -k 5 "$seconds" "${under[@]}" \
            "$python" -m tests.gpu.sanitized threads --ranks "$ranks" "${arguments[@]}"
    else
        timeout -k 5 "$seconds" "$python" -m nvcoll run -n "$ranks" -- "${under[@]}" \
            "$python" -m tests.gpu.sanitized processes "${arguments[@]}"
    fi
}

try() { # try NAME FORM ARGUMENTS... [@ TOOL]: run it and say whether it passed
    local name=$1 what=$2 before=$SECONDS expected=1 status log
    shift
    log=$work/${name//[^a-z]/-}.log
    start "$@" </dev/null >"$log" 2>&1
    status=$?
    [[ $what == threads ]] || expected=$ranks
    # The tool may end well without having run the program: both must say that all is right.
    local right clean=$expected
    right=$(grep -c '^sanitized: all right' "$log")
    [[ " $* " != *" @ "* ]] || clean=$(grep -Ec 'SUMMARY: 0 (errors|hazards)' "$log")
    if ((status == 0 && right == expected && clean == expected)); then
        echo "passed   $name: $(grep -m1 -o '[0-9]* calls on [0-9]* ranks' "$log"), $((SECONDS - before)) s"
        return 0
    fi
    echo "FAILED   $name: exit status $status, $((SECONDS - before)) s; see $log, which ends"
    tail -n 25 "$log" | sed 's/^/    /'
    return 1
}

control() { # whether memcheck sees a call of this form that writes to memory that was given back
    local log=$work/control.log before=$SECONDS
    # The other ranks wait for one whose kernel was stopped, so their deadline is short.
    if NVCOLL_TIMEOUT=20 start "$form" --spoil @ memcheck </dev/null >"$log" 2>&1 ||
        ! grep -q 'Invalid __global__ write' "$log"; then
        echo "FAILED   $form, memcheck: it does not see a write to memory that was given back; see $log, which ends"
        tail -n 25 "$log" | sed 's/^/    /'
        return 1
    fi
    echo "passed   $form, memcheck sees a write to memory that was given back, $((SECONDS - before)) s"
}

if [[ $form == auto ]]; then
    form=threads
    try "threads, no tool" threads --algorithms one_shot/simple --limit 1 || exit 2
    one=(--algorithms one_shot/simple --limit 1)
    if ! seconds=90 NVCOLL_TIMEOUT=15 try "threads, one call, memcheck" threads "${one[@]}" @ memcheck; then
        form=processes
        echo "auto     threads do not get through, for the reason above; taking processes"
    fi
fi
try "$form, no tool" "$form" --kinds "$kinds" "${chosen[@]}" || exit 2
[[ ,$tools, != *,memcheck,* ]] || control || failed=1
for tool in ${tools//,/ }; do
    if [[ $tool == racecheck ]]; then
        try "$form, one call, $tool" "$form" --algorithms one_shot/simple --limit 1 @ "$tool" || failed=1
    else
        try "$form, $tool" "$form" --kinds "$kinds" "${chosen[@]}" @ "$tool" || failed=1
    fi
done
((failed)) || rm -rf "$work"
echo "sanitize: $( ((failed)) && echo FAILED || echo all right), $form, $ranks ranks"
exit "$failed"
