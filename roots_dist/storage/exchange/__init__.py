"""Import from and export to Hugging Face. ARCHITECTURES has a table per model type (gpt2.py, llama.py, …) for both
directions.

HF folder --importing.py--> run/checkpoints/step_00000000 run --exporting.py--> HF folder --compare.py--> the same
logits?
"""

from roots_dist.storage.exchange.bert import BERT, CAMEMBERT, DISTILBERT, ROBERTA, XLM_ROBERTA
from roots_dist.storage.exchange.bloom import BLOOM
from roots_dist.storage.exchange.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from roots_dist.storage.exchange.electra import ELECTRA
from roots_dist.storage.exchange.falcon import FALCON, GPTJ, PHI
from roots_dist.storage.exchange.gemma import GEMMA, GEMMA2, GEMMA3
from roots_dist.storage.exchange.gpt2 import GPT2, OPT
from roots_dist.storage.exchange.gpt_neox import GPT_NEOX
from roots_dist.storage.exchange.llama import GRANITE, LLAMA, MISTRAL, PHI3, QWEN2, QWEN3, SMOLLM3
from roots_dist.storage.exchange.mixtures import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from roots_dist.storage.exchange.olmo import OLMO, OLMO2, OLMO3
from roots_dist.storage.exchange.starcoder2 import STABLELM, STARCODER2
from roots_dist.storage.exchange.t5 import MT5, T5
from roots_dist.storage.exchange.table import Architecture, with_bare_stack

DECODERS = (
    GPT2, BLOOM, LLAMA, GPT_NEOX, OPT, MISTRAL, PHI3, QWEN2, QWEN3, SMOLLM3, GRANITE, STARCODER2, STABLELM,
    FALCON, GPTJ, PHI, GEMMA, GEMMA2, GEMMA3, OLMO, OLMO2, OLMO3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE,
    DEEPSEEK_V2, DEEPSEEK_V3,
)  # fmt: skip
ENCODERS = (BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, ELECTRA)
BARE_NAMES = {"gemma3_text": "Gemma3Text"}
"""Classes of a stack alone that are not called as the others of their type."""
ONE_STACK = [with_bare_stack(table, BARE_NAMES.get(table.model_type)) for table in (*DECODERS, *ENCODERS)]
ARCHITECTURES: dict[str, Architecture] = {table.model_type: table for table in (*ONE_STACK, T5, MT5)}
"""Table of each model_type. An export uses the one that the model was imported from, or else the first one; of those
that support all features of the model."""
