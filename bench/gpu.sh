#!/usr/bin/env bash
# Build, test and measure the kernels on one NVIDIA GPU, without a network, in less than eight minutes.
#
#   bench/gpu.sh                  everything; writes bench/results/gpu-<name of the GPU>.json
#   bench/gpu.sh --plan           print what would run; needs no GPU and builds nothing
#   bench/gpu.sh --quick          smoke test: two cases per operator, briefly
#   bench/gpu.sh --out FILE       write this result file instead
#   bench/gpu.sh --liger WHEEL    measure Liger as well, from its wheel, if it is not installed
#   bench/gpu.sh --commit ID      commit to record if the tree is not a clone
#   bench/gpu.sh --keep FOLDER    build in this folder, and reuse what was built there before
#
# Python is $PYTHON, else python3, else, if that has no torch, .venv/bin/python.
# It needs torch, triton, numpy, pytest; cmake, ninja, pybind11, nvcc.
# A step that fails is recorded, the others still run, and the exit status is 1.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x $root/.venv/bin/python ]] && ! python3 -c 'import torch' 2>/dev/null; then
  python=$root/.venv/bin/python
fi
plan='' quick='' out='' liger='' commit='' keep=''
budget=470 # seconds in total: no step starts or continues after them

while (($#)); do
  case $1 in
    --plan) plan=1 ;;
    --quick) quick=--quick ;;
    --out | --liger | --commit | --keep)
      (($# > 1)) || { echo "gpu.sh: $1 needs a value" >&2 && exit 2; }
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    -h | --help)
      sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit
      ;;
    *) echo "gpu.sh: unknown option $1; see --help" >&2 && exit 2 ;;
  esac
  shift
done
[[ -z $liger || -f $liger ]] || { echo "gpu.sh: --liger: there is no file $liger" >&2 && exit 2; }
# Relative paths refer to the folder of the caller, which is not the working directory.
for name in out liger keep; do
  [[ -z ${!name} || ${!name} == /* ]] || printf -v "$name" %s "$PWD/${!name}"
done

work=/tmp/feddistill-gpu # shown by --plan
if [[ -n $keep ]]; then
  work=$keep
elif [[ -z $plan ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
site=$work/site # the package as installed: its Python, and the module compiled here
shares=$(nproc 2>/dev/null || echo 4)
((shares <= 10)) || shares=10
failed=0 job=''

# With --plan, print the command instead of running it.
run() {
  if [[ -n $plan ]]; then
    echo "    $*"
  else
    "$@"
  fi
}

# quietly LOG COMMAND...: run with output to LOG.
quietly() {
  if [[ -n $plan ]]; then
    echo "    ${*:2}"
  else
    "${@:2}" >"$1" 2>&1
  fi
}

# Run with the built package before the tree on the path; bench/ is in the tree only.
inside() { cd "$site" && PYTHONPATH=$site${liger:+:$work/liger}:$root "$@"; }

# step NAME SECONDS COMMAND...: run with a time limit, within the budget; record the outcome.
step() {
  local name=$1 limit=$2 status=0 start=$SECONDS
  shift 2
  ((limit <= budget - SECONDS)) || limit=$((budget - SECONDS))
  echo "=== $name: $* (at most $limit s)"
  if [[ -n $plan ]]; then
    "$@"
    return
  fi
  if ((limit > 0)); then
    within "$limit" "$@" || status=$?
  else
    status=124
  fi
  local said=''
  [[ $name != tests ]] || said=$(counted || true)
  [[ $status != 124 ]] || said+='timed out'
  note "$name" "$status" $((SECONDS - start)) "$said"
}

# `timeout` takes no functions.  The step is a process group, which is killed as a whole.
within() {
  local limit=$1 watch status=0
  shift
  set -m
  ("$@") &
  job=$!
  (sleep "$limit" && kill -KILL -- "-$job") >/dev/null 2>&1 &
  watch=$!
  set +m
  wait "$job" || status=$?
  job=''
  kill -- "-$watch" 2>/dev/null && wait "$watch" 2>/dev/null || true
  ((status != 137)) || status=124
  return "$status"
}
trap '[[ -z $job ]] || kill -KILL -- "-$job"; exit 130' INT TERM

note() {
  [[ $2 == 0 ]] || failed=1
  "$python" -m bench.gpu note "$1" "$2" "$3" --said "$4" --out "$out" || failed=1
}

machine() {
  local query=name,memory.total,driver_version,compute_cap,clocks.max.sm,clocks.max.memory
  run nvidia-smi --query-gpu="$query" --format=csv || echo "nvidia-smi failed"
  run "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)" --version || echo "nvcc is not installed"
  run "$python" -c 'import sys, torch, triton; print(sys.version, torch.__version__, torch.version.cuda, triton.__version__)'
}

# For this GPU only: other architectures are compiled in CI.
build() {
  local capability='<capability of the GPU>'
  if [[ -z $plan ]]; then
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')
  fi
  # Triton runs without a compiled module as well.
  run rm -rf "$site" && run mkdir -p "$site" && run cp -r "$root/feddistill_kernels" "$site/" || return
  run find "$site" -name '_C*.so' -delete || return
  if [[ -n $liger ]]; then
    run "$python" -m zipfile -e "$liger" "$work/liger" || return
  fi
  run cmake -G Ninja -S "$root" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX="$site" \
    -DSKBUILD_PROJECT_NAME=feddistill -DSKBUILD_PROJECT_VERSION=0.1.0 \
    -DFEDDISTILL_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$capability" \
    -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir 2>/dev/null || echo '<pybind11>')" || return
  run cmake --build "$work/build" || return
  run cmake --install "$work/build"
}

# Warnings of other versions of PyTorch and Python are not failures here.
pytest=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -q -W default --device cuda)

# Shares of the tests in parallel, since Triton's compiler takes most of the time, and the sanitizer beside them.
tests() {
  local share jobs=() status=0
  export TRITON_CACHE_DIR=$work/triton
  (sanitize memcheck) &
  if [[ -n $plan ]]; then
    wait
    quietly '' "${pytest[@]}" --maxfail 5 --share "I/$shares" "$root/tests/kernels"
    return
  fi
  for ((share = 0; share < shares; share++)); do
    (quietly "$work/tests-$share.log" inside "${pytest[@]}" --maxfail 5 --share "$share/$shares" "$root/tests/kernels") &
    jobs+=($!)
  done
  for share in "${!jobs[@]}"; do
    wait "${jobs[$share]}" || status=1
  done
  wait
  return "$status"
}

# Count the outcomes of the shares that finished.
counted() {
  tail -qn 1 "$work"/tests-*.log | grep -oE '[0-9]+ (passed|failed|errors?|skipped)' |
    awk '{ sums[$2] += $1 } END { for (kind in sums) printf "%d %s ", sums[kind], kind }'
}

# Failures in all shares, those that were killed included.
failures() {
  [[ -n $plan ]] || grep -hE '^(FAILED|ERROR|E  )' "$work"/tests-*.log | cut -c1-300 | head -60 || true
}

# Without PyTorch's caching allocator, which hides accesses past the end of a tensor.
sanitize() {
  local status=0 log=$work/$1.log
  if [[ -z $plan ]] && ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed" >"$log"
  else
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    quietly "$log" inside compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all --print-limit 5 \
      "${pytest[@]}" -k small_shapes "$root/tests/kernels/test_gpu.py" || status=$?
    if [[ -z $plan ]] && grep -q 'Device not supported' "$log"; then
      echo 'compute-sanitizer does not support this device' >>"$log"
      status=0
    fi
  fi
  [[ -n $plan ]] || echo "$status" >"$work/$1.status"
}

sanitized() {
  if [[ -n $plan ]]; then
    echo "    (output of compute-sanitizer, which ran beside the tests)"
    return
  fi
  tail -n 8 "$work/$1.log"
  [[ $(cat "$work/$1.status") == 0 ]]
}

racecheck() {
  sanitize racecheck && sanitized racecheck
}

measure() {
  local command=("$python" -m bench.gpu measure "$1" --out "$out" ${quick:+--quick} ${commit:+--commit "$commit"})
  if [[ -n $plan ]]; then
    echo "    ${command[*]}"
    sed -n "s/^$1: /      /p" <<<"$cases"
    return
  fi
  export TRITON_CACHE_DIR=$work/triton
  inside "${command[@]}"
}

cd "$root"
if [[ -z $out && -n $quick ]]; then
  out=$work/gpu.json # temporary
elif [[ -z $out && -n $plan ]]; then
  out=$root/bench/results/gpu-'<name of the GPU>'.json
elif [[ -z $out ]]; then
  out=$root/bench/results/$("$python" -m bench.gpu name)
fi
echo "result file: $out"
if [[ -n $plan ]]; then
  cases=$("$python" -m bench.gpu cases $quick)
else
  mkdir -p "$work"
  rm -f "$out"
fi

step machine 30 machine
step build 180 build
step tests 160 tests
failures
step memcheck 10 sanitized memcheck
step loss 110 measure loss
step compression 50 measure compression
step linear 70 measure linear
step median 60 measure median
step distances 60 measure distances
step answers 30 measure answers
step racecheck 60 racecheck
if [[ -n $plan ]]; then
  exit
fi
echo "=== $out after $SECONDS s"
"$python" -m bench.gpu bars "$out" || failed=1
exit "$failed"
