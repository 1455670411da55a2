"""A job for Kubernetes: an Indexed Job with a headless service, or a TrainJob of Kubeflow's Trainer.

Job --plan--> manifest (templates/kubernetes.yaml, templates/trainjob.yaml) --kubectl apply--> pods
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from roots_dist.runs.launch import render
from roots_dist.runs.launch.job import Job, LaunchPlan
from roots_dist.runs.launch.options import KubernetesOptions
from roots_dist.runs.launch.quoting import refused
from roots_dist.runs.ranks.local import SIGNALS

LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
"""RFC 1035, as for names of services and pods."""
MANIFESTS = {"job": "kubernetes.yaml", "trainjob": "trainjob.yaml"}
MOUNT_PATH = Path("/work")
"""Mount path of the volume: the working folder of the images (docker/), from which relative paths begin."""
PORT = 29400


def plan(job: Job, environ: Mapping[str, str]) -> LaunchPlan:
    options = job.options
    assert isinstance(options, KubernetesOptions), options
    _check(job, options)
    name = MANIFESTS[options.kind]
    selector = f"app.kubernetes.io/instance={job.name}"
    file = job.files / name
    return LaunchPlan(
        command=(options.program or "kubectl", "apply", *options.extra, "-f", str(file)),
        programs={options.program or "kubectl": "--program"},
        files={file: render.manifest(name, options.template, values(job, options))},
        logs=f"kubectl --namespace {options.namespace} logs --prefix --follow --selector {selector}",
        notes=(
            f"{job.words[0]}, its data and {job.folder} have to lie in the claim {options.pvc}, seen at {MOUNT_PATH}",
            f"delete a job of this name that has ended before the next one: kubectl delete -f {shlex.quote(str(file))}",
        ),
    )


def values(job: Job, options: KubernetesOptions) -> dict[str, object]:
    """The values of the gaps in a manifest."""
    selector = {"app.kubernetes.io/instance": job.name}
    restarts = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if options.max_restarts else {}  # as in torchrun.sh
    return {
        "name": job.name,
        "namespace": options.namespace,
        "labels": {"app.kubernetes.io/name": "roots", **selector},
        "selector": selector,
        "image": options.image,
        "claim": options.pvc,
        "mount_path": str(MOUNT_PATH),
        "port": PORT,
        "nodes": job.nodes,
        "processes_per_node": job.processes_per_node,
        "attempts": max(1, options.max_restarts),
        "termination_s": options.grace + 30,
        "resources": {"limits": {"nvidia.com/gpu": job.processes_per_node}}
        if job.gpus
        else {"requests": {"cpu": job.processes_per_node}},
        "torchrun": [literal(options.python or "python"), "-m", "torch.distributed.run"],
        "rendezvous_args": [
            f"--nnodes={job.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-id={job.name}",
            f"--rdzv-endpoint={job.name}-0.{job.name}:{PORT}",
        ],
        "torchrun_args": [
            f"--nproc-per-node={job.processes_per_node}",
            f"--max-restarts={options.max_restarts}",
            f"--signals-to-handle={SIGNALS}",
            f"--shutdown-timeout={options.grace}",
        ],
        "roots_args": [literal(word) for word in job.command],
        "variables": [{"name": key, "value": literal(value)} for key, value in {**restarts, **job.env}.items()],
    }


def _check(job: Job, options: KubernetesOptions) -> None:
    if options.kind not in MANIFESTS:
        raise refused("--kind", options.kind, "job or trainjob", "choose one of the two")
    if options.image is None:
        raise refused("--image", None, "an image with roots in it (docker/)", "add --image NAME")
    if options.pvc is None:
        expected = f"the claim of the volume with data and runs, which is mounted at {MOUNT_PATH}"
        raise refused("--pvc", None, expected, "add --pvc NAME")
    for option, value, longest in (
        ("--name", job.name, 50),
        ("--namespace", options.namespace, 63),
        ("--pvc", options.pvc, 63),
    ):
        if not LABEL.fullmatch(value) or len(value) > longest:
            expected = f"at most {longest} of a-z, 0-9 and -, beginning with a letter"
            raise refused(option, value, expected, "choose such a name")
    if options.template is None and not Path(os.path.normpath(MOUNT_PATH / job.folder)).is_relative_to(MOUNT_PATH):
        expected = f"a folder below {MOUNT_PATH}, where the claim is mounted: anything else is gone with the pod"
        raise refused("track.folder", str(job.folder), expected, f"use a relative one, such as runs/{job.name}")


def literal(text: str) -> str:
    """Escape text in which Kubernetes would replace $(NAME) by a variable: $$ is a dollar sign."""
    return text.replace("$", "$$")
