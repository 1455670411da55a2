#!/bin/bash
# Train with torchrun on this machine, or on several: then the same command is given on each of them.
#   launch/torchrun.sh CONFIG [section.key=value ...]
#   NODES=2 RDZV_ENDPOINT=node1:29400 launch/torchrun.sh CONFIG [section.key=value ...]
# SIGTERM or SIGUSR1 to torchrun stops the run with a checkpoint; the same command resumes.
#
# Settings: each can be replaced by an environment variable.
: "${COMMAND:=train}"             # or finetune
: "${NODES:=1}"
: "${PROCESSES_PER_NODE:=auto}"   # auto: one for each GPU, or for each core where there is no GPU
: "${RDZV_ENDPOINT:=}"            # HOST:PORT on one of several nodes, where they meet
: "${RDZV_ID:=roots}"             # the same on all nodes
: "${MAX_RESTARTS:=0}"            # of ranks that fail, from the newest checkpoint
: "${GRACE:=120}"                 # seconds for a step and a checkpoint after a signal
: "${LOGS:=logs}"                 # folder for the logs of each rank
: "${PYTHON:=python}"
read -ra extra <<< "${EXTRA:-}"   # more options for torchrun
# End of settings
set -u
: "${1:?usage: launch/torchrun.sh CONFIG [section.key=value ...]}"
if ((NODES == 1)); then
  case $OSTYPE in darwin*) loopback=lo0 ;; *) loopback=lo ;; esac
  export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$loopback}"
  rendezvous=(--rdzv-endpoint="${RDZV_ENDPOINT:-localhost:0}" --local-addr=127.0.0.1)
else
  rendezvous=(--rdzv-endpoint="${RDZV_ENDPOINT:?set it to HOST:PORT of one of the $NODES nodes}")
fi
if ((MAX_RESTARTS > 0)); then export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; fi # the old store holds keys of dead ranks

signals=
for name in SIGTERM SIGINT SIGHUP SIGQUIT SIGUSR1; do # torchrun would end at those that nohup or a shell has it ignore
  [[ -n $(trap -p "$name") ]] || signals+=,$name
done

exec "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$PROCESSES_PER_NODE" \
  --rdzv-backend=c10d --rdzv-id="$RDZV_ID" "${rendezvous[@]}" --max-restarts="$MAX_RESTARTS" \
  --signals-to-handle="${signals#,}" --shutdown-timeout="$GRACE" --log-dir="$LOGS" --tee=3 "${extra[@]}" \
  -m roots_dist "$COMMAND" "$@"
