#!/usr/bin/env bash
# Runs on a GPU machine that has bash, and a Python with torch, triton and numpy: no network, root,
# make or pip. `make gpu-bundle` has put the other packages beside, for CPython 3.12 on x86-64.
#
#   bash bench/studies/gpu.sh [-o FOLDER] correctness [PART ...]   tests/gpu_parts.py
#   bash bench/studies/gpu.sh [-o FOLDER] bench [OPTION ...]       bench/studies/gpu.py
#   bash bench/studies/gpu.sh [-o FOLDER] tune [OPTION ...]        triton-sparsity autotune
#
# What was found is in FOLDER (runs/gpu) at any moment. Each ends within ten minutes but for tune,
# which may be cut off; of all three the same command goes on or begins anew. PYTHON names another
# interpreter than python3, BUNDLE another folder of the bundle.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
bundle=${BUNDLE:-$root/.gpu-bundle}
out=$root/runs/gpu
if [ "${1:-}" = -o ]; then
    mkdir -p "$2"
    out=$(cd "$2" && pwd)
    shift 2
fi
job=${1:-nothing}
case $job in
correctness | bench | tune) shift ;;
*)
    echo "gpu.sh: must be correctness, bench or tune, got $job" >&2
    exit 2
    ;;
esac

# a wheel is an archive of what is to be on the path; outside of the checkout, which it would swell
site=$("$python" - "$root" "$bundle" <<'PYTHON'
import os
import pathlib
import shutil
import sys
import tempfile
import zipfile

root, bundle = map(pathlib.Path, sys.argv[1:])
wheels = sorted((bundle / "wheels").glob("*.whl"))
if not wheels:
    sys.exit(f"{bundle}/wheels must hold wheels, got none: run make gpu-bundle where there is a network")
# by that name hypothesis knows other people's code, which it does not read for constants
site = pathlib.Path(tempfile.gettempdir(), f"triton-sparsity-{os.getuid()}", "site-packages")
names = "\n".join(wheel.name for wheel in wheels)
done = site / "wheels.txt"
if not done.exists() or done.read_text() != names:
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(site)
    done.write_text(names)
# the package's root is the checkout's
link = site / "triton_sparsity"
if not link.is_symlink() or os.readlink(link) != str(root):
    link.unlink(missing_ok=True)
    link.symlink_to(root)
print(site)
PYTHON
)
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"

case $job in
correctness) exec "$python" "$root/tests/gpu_parts.py" --output "$out" "$@" ;;
bench) exec "$python" -m triton_sparsity.bench.studies.gpu --output "$out" "$@" ;;
tune) exec "$python" -m triton_sparsity.bench.cli autotune --output "$out/tuning.json" "$@" ;;
esac
