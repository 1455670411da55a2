"""Make the table of docs/exchange.md: what each model type was compared with, and how far apart the two were.

    PYTHONPATH=. ROOTS_TRANSFORMERS_4=PYTHON python tests/exchange/families_table.py

Small models with random weights, in float32 on the CPU: logits and gradients of one process, logits of TP2 × PP2, what
version 4 of transformers computes from the export, and its tensors. Ends with 1 if one of them is not what it should
be.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import transformers
from hub_checks import differences, tensors_that_differ
from hub_models import FIRST, MODELS, generator_of, saved
from test_exchange_layouts import logits_of_layout
from test_exchange_transformers_4 import OTHER_SCORES, asked_of, inputs_of, read_by_version_4
from torch import Tensor

from roots_dist.config.objectives import OBJECTIVES
from roots_dist.config.run_config import config_of_run
from roots_dist.storage.exchange import ARCHITECTURES
from roots_dist.storage.exchange.compare import comparison_batch, outputs_of, their_logits
from roots_dist.storage.exchange.exporting import export_model
from roots_dist.storage.exchange.importing import import_model
from roots_dist.storage.exchange.table import Head
from roots_dist.storage.exchange.tensors import read_json

PAGE = Path(__file__).parents[2] / "docs" / "exchange.md"

RELEASED = {
    "gpt2": "GPT-2",
    "bloom": "BLOOM",
    "llama": "Llama 1 to 3.3, R1-distilled, DeepSeek-Coder, CodeLlama",
    "gpt_neox": "GPT-NeoX 20B, Pythia; the quickstart",
    "opt": "OPT but for 350M",
    "mistral": "Mistral 7B, Nemo 12B",
    "phi3": "Phi-3 mini and medium, 4k and 128k; Phi-3.5 mini, Phi-4",
    "qwen2": "Qwen 2, Qwen 2.5, R1-distilled",
    "qwen3": "Qwen 3, dense",
    "smollm3": "SmolLM3 3B",
    "granite": "Granite 3, dense",
    "starcoder2": "StarCoder2",
    "stablelm": "StableLM 2 1.6B, StableLM 3B",
    "falcon": "Falcon 7B, 40B, 11B",
    "gptj": "GPT-J 6B",
    "phi": "Phi 1, 1.5, 2",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 270M, 1B",
    "olmo": "OLMo 1 without clip_qkv",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "qwen2_moe": "Qwen 1.5 MoE A2.7B, Qwen 2 57B-A14B",
    "qwen3_moe": "Qwen 3 30B-A3B, 235B-A22B",
    "olmoe": "OLMoE 1B-7B",
    "deepseek_v2": "DeepSeek-V2, V2-Lite",
    "deepseek_v3": "DeepSeek-V3 and R1, turned back from FP8",
    "bert": "BERT",
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-R",
    "camembert": "CamemBERT",
    "distilbert": "DistilBERT",
    "electra": "ELECTRA",
    "t5": "T5 v1.0 and v1.1, Flan-T5",
    "mt5": "mT5",
}


def _is_tuned(head: Head) -> bool:
    return OBJECTIVES[head.objectives[0]].has_labels and not head.bare


TWO_HEADS = ("bert", "electra")
"""Their gradients are compared in tests/reference."""
BOUNDS = {"logits": 1e-5, "gradients": 2e-5, "TP2 × PP2": 1e-5, "4.57": 1e-5}


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, as a share of the largest logit or of 1."""
    far = [(a - b).abs().max() / max(1.0, b.abs().max()) for a, b in zip(found, expected, strict=True)]
    return max(one.item() for one in far)


def theirs_of(folder: Path, run: Path) -> list[Tensor]:
    config = config_of_run(run).config
    parts = [part for part in (generator_of(folder), folder) if part is not None]
    return [their_logits(part, comparison_batch(config), outputs_of(config)) for part in parts]


def measure(place: Path) -> tuple[dict[str, dict[str, list[float]]], dict[str, list[str]], str]:
    """For each model type its differences by column, tensors that did not come back, and version 4's number."""
    far: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    lost: dict[str, list[str]] = defaultdict(list)
    told, expected = {}, {}
    for name in MODELS:
        theirs, run, back = (place / name / part for part in ("theirs", "run", "back"))
        import_model(saved(name, theirs), run, generator_of(theirs))
        kind = str(read_json(theirs / "config.json")["model_type"])
        export_model(run, back)
        lost[kind] += [f"{name}: {tensor}" for tensor in tensors_that_differ(name, theirs, back)]
        if "bare" in name.split():
            continue
        if name not in OTHER_SCORES:
            asked = asked_of(name, back, inputs_of(name, comparison_batch(config_of_run(run).config)))
            told |= asked
            expected |= dict(zip(asked, zip([kind] * len(asked), theirs_of(theirs, run))))
        if name not in TWO_HEADS:
            result = differences(theirs, run)
            far[kind]["logits"].append(result.logits / max(1.0, result.largest_logit))
            far[kind]["gradients"].append(result.gradients)
        if name in FIRST:
            even, run = place / name / "even", place / name / "even run"
            import_model(saved(name, even, even=True), run, generator_of(even))
            wanted = theirs_of(even, run)
            far[kind]["TP2 × PP2"] += [apart(found, wanted) for found in logits_of_layout(run)]
    found, version, _ = read_by_version_4(told, place)
    for key, (kind, logits) in expected.items():
        far[kind]["4.57"].append(apart([found[key]], [logits]))
    return far, lost, version


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        far, lost, version = measure(Path(folder))
    columns = ["model type", "released models", "class", "fine-tuned", "models", *BOUNDS, "back"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    wrong = [tensor for tensors in lost.values() for tensor in tensors]
    for kind, architecture in ARCHITECTURES.items():
        tasks = ", ".join(head.objectives[0] for head in architecture.heads if _is_tuned(head))
        numbers = [max(far[kind][column]) for column in BOUNDS]
        wrong += [f"{kind}: {column} {n:.0e}" for n, (column, bound) in zip(numbers, BOUNDS.items()) if not n < bound]
        shown = [f"{number:.0e}".replace("0e+00", "0") for number in numbers]
        classes, count = f"`{architecture.heads[0].architecture}`", str(len(far[kind]["logits"]))
        names = [f"`{kind}`", RELEASED[kind], classes, tasks, count]
        lines.append(f"| {' | '.join([*names, *shown, '✗' if lost[kind] else '✓'])} |")
    text = PAGE.read_text(encoding="utf-8")
    table = re.compile(r"^\| model type \|.*\n(?:\|.*\n)+", re.M)
    PAGE.write_text(table.sub("\n".join(lines) + "\n", text), encoding="utf-8")
    print(f"transformers {transformers.__version__} and {version}: {PAGE}", *wrong, sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()
