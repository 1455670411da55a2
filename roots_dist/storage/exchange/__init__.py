"""Import from and export to Hugging Face. ARCHITECTURES has a table per model type (gpt2.py, llama.py, …) for both
directions.

HF folder --importing.py--> run/checkpoints/step_00000000 run --exporting.py--> HF folder --compare.py--> the same
logits?
"""

from roots_dist.storage.exchange.bert import BERT, ROBERTA
from roots_dist.storage.exchange.bloom import BLOOM
from roots_dist.storage.exchange.electra import ELECTRA
from roots_dist.storage.exchange.gpt2 import GPT2
from roots_dist.storage.exchange.llama import GPT_NEOX, LLAMA
from roots_dist.storage.exchange.t5 import T5
from roots_dist.storage.exchange.table import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    table.model_type: table for table in (GPT2, BLOOM, LLAMA, GPT_NEOX, BERT, ROBERTA, ELECTRA, T5)
}
"""Table of each model_type. An export uses the first one that supports all features of the model."""
