"""Print the table of docs/exchange.md: what each model type was compared with, and how far apart the two were.

    PYTHONPATH=. python tests/exchange/families_table.py

Small models with random weights, in float32 on the CPU: logits, and gradients of every tensor.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import transformers
from hub_checks import differences
from hub_models import MODELS, generator_of, saved

from roots_dist.config.objectives import OBJECTIVES
from roots_dist.storage.exchange import ARCHITECTURES
from roots_dist.storage.exchange.importing import import_model
from roots_dist.storage.exchange.table import Head
from roots_dist.storage.exchange.tensors import read_json

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


def main() -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            theirs = saved(name, Path(folder) / name / "theirs")
            run = Path(folder) / name / "run"
            import_model(theirs, run, generator_of(theirs))
            if name in TWO_HEADS or "bare" in name.split():
                continue
            result = differences(theirs, run)
            kind = str(read_json(theirs / "config.json")["model_type"])
            found.setdefault(kind, []).append((result.logits / max(1.0, result.largest_logit), result.gradients))
    print(f"transformers {transformers.__version__}\n")
    print("| model type | released models | class | fine-tuned | models | logits | gradients |")
    print("|---|---|---|---|---|---|---|")
    for kind, table in ARCHITECTURES.items():
        tasks = ", ".join(head.objectives[0] for head in table.heads if _is_tuned(head))
        logits, gradients = (max(column) for column in zip(*found[kind]))
        far = f"{len(found[kind])} | {logits:.0g} | {gradients:.0e}"
        print(f"| `{kind}` | {RELEASED[kind]} | `{table.heads[0].architecture}` | {tasks} | {far} |")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()
