#!/usr/bin/env bash
# Installs lmeff and JAX for TPUs on every worker from one wheel and one file of constraints, and stops where versions differ.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
setup.sh --name NAME --project PROJECT --zone ZONE --wheel FILE.whl [--constraints FILE] [--slices N] [--python 3.11] [--extras tpu,report,text]
         [--internal-ips] [--settings FILE] [--dry-run]

Sends the wheel and the constraints to every worker, makes a virtual environment in ~/lmeff-tpu/venv and installs both there. Then asks every
worker for its versions of python, jax, jaxlib, libtpu and lmeff: where one differs from the others or from the constraints it is named, and the
exit code is 24. A wheel:  python -m pip wheel . --no-deps -w dist
The images of TPU VMs have an older Python than lmeff needs; uv, in a pinned version, brings it. Installing again changes nothing that is right.
END
}

readonly UV=0.13.9 # https://pypi.org/project/uv

DEFAULT=([constraints]=$HERE/constraints.txt [extras]="tpu,report,text" [python]=3.11)
parse "name project zone slices wheel constraints extras python" "internal-ips" "name project zone wheel" -- "$@"
no_positional
wheel=${SET[wheel]} constraints=${SET[constraints]}
for file in "$wheel" "$constraints"; do
  [[ -r $file ]] || die "$USAGE" "$file: cannot be read, expected a file"
done
for package in jax jaxlib libtpu; do
  grep -qE "^$package==[0-9]" "$constraints" ||
    die "$USAGE" "$constraints: pins no $package, expected a line $package==VERSION; else workers may get different ones"
done
cp "$constraints" "$TEMPORARY/constraints.txt"
copy=$TEMPORARY/constraints.txt
dry && copy=$constraints

count_workers || die "$LOST" "$WHY"
prepare
send "$wheel" "$copy"
far all all install "$(basename "$wheel")" "$(digest "$wheel")" "${SET[extras]}" "${SET[python]}" "$UV"
if dry; then
  far all all versions
  exit 0
fi
failed=$(refusals)
[[ -z $failed ]] || die 1 "${SET[name]}: not installed on $(answers failed) of $WORKERS workers: $failed"
(($(answers installed) == WORKERS)) || die "$LOST" "${SET[name]}: $(answers installed) of $WORKERS workers installed: $(reason)"

far all all versions
(($(answers versions) == WORKERS)) || die "$LOST" "${SET[name]}: $(answers versions) of $WORKERS workers told their versions: $(reason)"
usual=$(sed -n 's/^@ [^ ]* versions //p' <<<"$OUT" | sort | uniq -c | sort -rn | head -n 1 | sed 's/^ *[0-9]* //')
others=$(sed -n 's/^@ \([^ ]*\) versions /worker \1 has /p' <<<"$OUT" | grep -vF " has $usual" | sort | head -n 5 || true)
[[ -z $others ]] || die "$DIFFERENT" "versions differ: $others, the others have $usual; run setup.sh again, or delete.sh and create.sh"
for package in jax jaxlib libtpu; do
  pinned=$(sed -n "s/^$package==\([^ ;]*\).*/\1/p" "$constraints" | head -n 1)
  [[ " $usual " == *" $package=$pinned "* ]] || die "$DIFFERENT" "$package: the workers have $usual, expected $package=$pinned as $constraints says"
done
say "${SET[name]}: $WORKERS workers, all with $usual"
