#!/bin/bash
# refusals.sh SCRIPT HEAD... :: TAIL...: calls a script between HEAD and TAIL with each case of stdin, three fields WAY SETTING VALUE that end in NUL, and
# prints what was not refused: an exit code other than 2, or not one line of reason that names the setting. A subshell a call, no new process.
dirname() { printf '%s' "${1%/*}"; } # as the program, without a process
script=$1
shift
head=() tail=()
while (($#)) && [[ $1 != :: ]]; do
  head+=("$1")
  shift
done
tail=("${@:2}")
while IFS= read -r -d '' way && IFS= read -r -d '' name && IFS= read -r -d '' value; do
  variable=${name^^}
  variable=LMEFF_TPU_${variable//-/_}
  (
    case $way in
      flag) set -- "${head[@]}" "--$name" "$value" "${tail[@]}" ;;
      joined) set -- "${head[@]}" "--$name=$value" "${tail[@]}" ;;
      environment)
        export "$variable=$value"
        set -- "${head[@]}" "${tail[@]}"
        ;;
      file)
        printf '%s=%s\n' "$name" "$value" >"$FAKE/settings"
        set -- "${head[@]}" --settings "$FAKE/settings" "${tail[@]}"
        ;;
      word) set -- "${head[@]}" "$value" "${tail[@]}" ;;
    esac
    # shellcheck disable=SC1090
    source "$script"
  ) >"$FAKE/out" 2>"$FAKE/err"
  code=$?
  mapfile -t lines <"$FAKE/err"
  [[ $code == 2 && ! -s $FAKE/out && ${#lines[@]} == 1 ]] && [[ $way == word || ${lines[0]} == *"$name"* || ${lines[0]} == *"$variable"* || ${lines[0]} == *"settings: line 2"* ]] && continue
  printf '%q: %s %s=%q: exit code %s: %s\n' "$script" "$way" "$name" "$value" "$code" "${lines[*]}"
done
