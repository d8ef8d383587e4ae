#!/usr/bin/env bash
# Has a running job traced for some seconds and brings the trace here.
# shellcheck source=tpu_scripts/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

help() {
  cat <<'END'
profile.sh --name NAME --project PROJECT --zone ZONE [--job JOB] [--seconds 5] [--node 0] [--worker 0] [--out profile] [--internal-ips]
           [--settings FILE] [--dry-run]

Two ways to a trace of jax.profiler:
  a run that is going     profile.sh: one worker traces the next --seconds, as they come; the trace is unpacked in --out. Nothing is restarted;
                          the run is somewhat slower meanwhile
  steps that are known    launch.sh --profile 10:13: steps 10 to 13 of each stage that trains, in RUN/profile/STAGE; fetch.sh brings them
View it: pip install xprof; xprof --logdir OUT
END
}

DEFAULT=([job]=latest [seconds]=5 [node]=0 [worker]=0 [out]=profile)
parse "name project zone job seconds node worker out" "internal-ips" "name project zone" -- "$@"
no_positional
far "${SET[node]}" "${SET[worker]}" profile "${SET[job]}" "${SET[seconds]}"
dry || (($(answers packed) == 1)) || die "$LOST" "${SET[name]}: no profile: $(grep '^@ ' <<<"$OUT" | head -n 1) $(reason)"
bring profile.tar.gz "${SET[node]}" "${SET[worker]}" "${SET[out]}"
