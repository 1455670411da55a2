#!/bin/bash
# {{ job.layout }} on {{ job.nodes }} nodes: one torchrun on each, told before its time is over, queued again until it is done.
# A site can have its own copy of this form: roots launch --template FILE.
set -u
cd -- {{ job.directory | sh }} || exit 1
run={{ (job.directory / job.folder) | sh }}
logs={{ logs | sh }}
{% for name, value in environ.items() %}
export {{ name }}={{ value | sh }}
{% endfor %}

step= told=
trap 'told=1; [[ -n $step ]] && kill -USR1 "$step" 2> /dev/null' USR1 # Slurm tells this script; srun hands it on to each torchrun
ended() { head -n 1 -- "$run/ended.txt" 2> /dev/null; }
{% if job.wishes.array %}
case "$(ended)" in finished*) echo "the run has finished: nothing is left to do"; exit 0 ;; esac
{% endif %}
rm -f -- "$run/ended.txt"
mkdir -p -- "$logs"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
{% if job.wishes.spare %}

# {{ job.wishes.spare }} of the nodes are spare: each is examined by itself, and the first {{ job.nodes }} that are well train.
well=$(mktemp -d -- "$logs/well-$SLURM_JOB_ID-XXXXXX") || exit 1
for node in "${nodes[@]}"; do # a step of its own for each: one that cannot even begin would end a common one
  { srun --nodes=1 --ntasks=1 --nodelist="$node" --output={{ log_pattern | sh }}/%j-check-"$node".log \
    timeout {{ check_seconds }} env -u SLURM_STEP_ID -u SLURM_STEPID \
    {{ job.python | sh }} -m roots_dist doctor --quick --processes {{ job.per_node }} && : > "$well/$node"; } &
done
until wait; do :; done # told in between, it waits on
passed=()
for node in "${nodes[@]}"; do
  if [[ -e $well/$node ]]; then passed+=("$node"); else echo "$node is left out: $logs/$SLURM_JOB_ID-check-$node.log" >&2; fi
done
rm -r -- "$well"
if ((${#passed[@]} < {{ job.nodes }})); then
  echo "only ${#passed[@]} of ${#nodes[@]} nodes are well, {{ job.nodes }} are needed" >&2
  exit 1
fi
nodes=("${passed[@]:0:{{ job.nodes }}}")
{% endif %}
list=$(IFS=,; echo "${nodes[*]}")
meet="${nodes[0]}:$((20000 + SLURM_JOB_ID % 20000))"

srun --nodes={{ job.nodes }} --ntasks={{ job.nodes }} --ntasks-per-node=1 --nodelist="$list" --kill-on-bad-exit=1 \
  --output={{ log_pattern | sh }}/%j-%N.log --open-mode=append \
  {{ job.python | sh }} {{ agent | sh }} \
  --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint="$meet" \
  {{ job.command | sh }} &
step=$!
while kill -0 "$step" 2> /dev/null; do wait "$step"; done
wait "$step"
code=$?

echo "$(date +%FT%T) job $SLURM_JOB_ID, exit code $code: $(ended)"
case "$(ended)" in
  stopped*) again=1 ;;
  "") again=$told ;; # told before training had begun: Slurm may do so a minute early
  *) again= ;;
esac
{% if job.wishes.array %}
[[ -n $again ]] && exit 0 # the next job of the array goes on
{% else %}
if [[ -n $again ]] && { [[ -n $(ended) ]] || ((${SLURM_RESTART_COUNT:-0} < 10)); }; then # the time may be too short ever to begin
  scontrol requeue "$SLURM_JOB_ID" && sleep 60 # which ends this script
fi
{% endif %}
exit "$code"
