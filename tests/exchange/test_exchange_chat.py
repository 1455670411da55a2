"""The four commands of the README: a released model and a file of conversations to a chat model that stops, served."""

import json

import pytest
import transformers
from commands import roots
from hub_models import saved_chat_model

ROWS = [
    ("what is the union", "one people"),
    ("who ordain liberty", "every citizen of the states"),
    ("secure what", "our common defence"),
]
LITTLE = (
    "parallel.tp=1", "train.device=cpu", "train.precision=fp32", "train.recompute=none", "data.seq_length=128",
    "train.global_batch=1", "finetune.strategy=full", "finetune.epochs=40", "optim.lr=1e-2", "finetune.lora_rank=8",
    "finetune.lora_alpha=16", 'finetune.lora_targets=["query","value"]',
)  # fmt: skip
"""What makes configs/chat.yaml fit a model of a few thousand weights."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    saved_chat_model(folder / "qwen3")
    rows = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in ROWS]
    (folder / "sharegpt.json").write_text(json.dumps(rows))
    return folder


def test_a_released_model_and_sharegpt_become_a_chat_model_that_stops(place):
    done = roots("import", f"{place}/qwen3", f"{place}/run")
    assert done.returncode == 0, done.stderr
    words = [f"finetune.init_from={place}/run", f"data.train={place}/sharegpt.json", f"track.folder={place}/chat"]
    done = roots("finetune", "configs/chat.yaml", *words, *LITTLE)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "read as ShareGPT's conversations" in said, said
    assert "3 rows are packed into 1 samples" in said
    done = roots("export", f"{place}/chat", f"{place}/export")
    assert done.returncode == 0 and "✓" in done.stdout, done.stdout + done.stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "export")
    reader = transformers.AutoTokenizer.from_pretrained(place / "export")
    for question, answer in ROWS:
        asked = [{"role": "user", "content": question}]
        given = reader.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        new = model.generate(**given, max_new_tokens=40, do_sample=False)[0, given["input_ids"].shape[1] :].tolist()
        assert reader.decode(new, skip_special_tokens=True).strip() == answer
        assert new[-1] == reader.convert_tokens_to_ids("<|im_end|>") and len(new) < 40
