"""Version 4 of transformers reads every export with the same logits: in a python of its own, which ROOTS_TRANSFORMERS_4
names."""

import json
import os
import subprocess

import pytest
import torch
from hub_models import MODELS, SPECIALS, generator_of, saved, tokenizer
from hub_tokenizers import STYLES
from safetensors.torch import load_file
from test_exchange_tokens import their_folder

from roots_dist.config.run_config import config_of_run
from roots_dist.storage.checkpoint.verified import best_or_newest
from roots_dist.storage.exchange.compare import comparison_batch, our_logits
from roots_dist.storage.exchange.exporting import export_model
from roots_dist.storage.exchange.importing import import_model

OTHER_SCORES = ("deepseek_v2",)
"""Its version of DeepSeek-V2 leaves out what mscale_all_dim multiplies scores by."""
PYTHON = os.environ.get("ROOTS_TRANSFORMERS_4")
READER = """
import json, sys, torch, transformers
from safetensors.torch import save_file
folder, told = sys.argv[1:]
found, ids = {}, {}
for name, one in json.load(open(told)).items():
    config = json.load(open(one["folder"] + "/config.json"))
    of_model = getattr(transformers, config["architectures"][0])
    # Gemma 2's caps are left out by version 4's other implementations of attention, which say so
    how = {"attn_implementation": "eager"} if config["model_type"] == "gemma2" else {}
    model, info = of_model.from_pretrained(one["folder"], output_loading_info=True, **how)
    assert not info["missing_keys"] and not info["unexpected_keys"], (name, info)
    inputs = {key: torch.tensor(value) for key, value in one["inputs"].items()}
    with torch.no_grad():
        out = model.eval()(**inputs)
    found[name] = (out.prediction_logits if "prediction_logits" in out else out.logits).contiguous()
    if one["text"]:
        ids[name] = dict(transformers.AutoTokenizer.from_pretrained(one["folder"])(one["text"]))
save_file(found, folder + "/logits.safetensors")
json.dump({"version": transformers.__version__, "ids": ids}, open(folder + "/ids.json", "w"))
"""


def read_by_version_4(told, place):
    """What version 4 computes from each folder of `told`, by the keys of it; its version, and ids of texts."""
    (place / "told.json").write_text(json.dumps(told))
    (place / "reader.py").write_text(READER)
    command = [PYTHON, place / "reader.py", place, place / "told.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    ids = json.loads((place / "ids.json").read_text())
    assert ids["version"].startswith("4.")
    return load_file(place / "logits.safetensors"), ids["version"], ids["ids"]


def asked_of(name, folder, inputs, text=None):
    """What to tell version 4 of an export, a folder for each head that has logits."""
    folders = [folder / "generator", folder] if name == "electra" else [folder]
    return {f"{name} {part.name}": {"folder": str(part), "inputs": inputs, "text": text} for part in folders}


def inputs_of(name, batch):
    inputs = {"input_ids": batch.tokens.tolist()}
    return inputs | ({"decoder_input_ids": batch.decoder_tokens.tolist()} if name.split()[0] in ("t5", "mt5") else {})


@pytest.mark.skipif(PYTHON is None, reason="ROOTS_TRANSFORMERS_4 names no python that has transformers 4.57")
def test_transformers_4_reads_every_export_with_the_same_logits(tmp_path):
    told, expected = {}, {}
    for name in [name for name in MODELS if name not in OTHER_SCORES]:
        theirs = saved(name, tmp_path / name / "theirs")
        run, back = tmp_path / name / "run", tmp_path / name / "back"
        if "gpt2" in name:  # version 5's tokenizers are refused by version 4, ours must not be
            from transformers import PreTrainedTokenizerFast

            PreTrainedTokenizerFast(tokenizer_object=tokenizer(SPECIALS["gpt"])).save_pretrained(theirs)
        import_model(theirs, run, generator_of(theirs))
        export_model(run, back)
        config = config_of_run(run).config
        batch = comparison_batch(config)
        ours = our_logits(config, best_or_newest(run), batch)
        asked = asked_of(name, back, inputs_of(name, batch), "w3 w5" if "gpt2" in name else None)
        told |= asked
        expected |= dict(zip(asked, ours, strict=True))
    found, _, ids = read_by_version_4(told, tmp_path)
    assert found.keys() == expected.keys()
    for key, logits in expected.items():
        torch.testing.assert_close(found[key], logits, rtol=1e-5, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert all(one == {"input_ids": [5, 7], "attention_mask": [1, 1]} for one in ids.values()) and ids


TOKENS = """
import json, sys, transformers
messages, found = [{"role": "user", "content": "the states"}], {}
for folder in sys.argv[1:]:
    read = transformers.AutoTokenizer.from_pretrained(folder)
    stops = transformers.GenerationConfig.from_pretrained(folder)
    found[folder] = [
        read("the people").input_ids, read.apply_chat_template(messages, add_generation_prompt=True), len(read),
        [read.bos_token, read.eos_token, read.pad_token], [stops.bos_token_id, stops.eos_token_id, stops.pad_token_id],
    ]
print(json.dumps([transformers.__version__, found]))
"""


@pytest.mark.skipif(PYTHON is None, reason="ROOTS_TRANSFORMERS_4 names no python that has transformers 4.57")
def test_transformers_4_reads_the_special_tokens_of_an_export_as_those_of_the_original(tmp_path):
    """Its classes of Llama's and Qwen's tokenizers go by add_bos_token, which the export has in tokenizer.json."""
    folders = []
    for style in STYLES:
        place = tmp_path / style
        place.mkdir()
        their_folder(style, place / "theirs")
        import_model(place / "theirs", place / "run")
        export_model(place / "run", place / "export")
        folders += [str(place / "theirs"), str(place / "export")]
    (tmp_path / "tokens.py").write_text(TOKENS)
    done = subprocess.run([PYTHON, tmp_path / "tokens.py", *folders], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    version, found = json.loads(done.stdout.splitlines()[-1])
    assert version.startswith("4.") and len(found) == 2 * len(STYLES)
    assert [found[folder] for folder in folders[::2]] == [found[folder] for folder in folders[1::2]]
