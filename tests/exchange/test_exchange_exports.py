"""Runs of ours as transformers reads them: which architecture, which files, which tokens; and what has no
architecture."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from hub_models import SPECIALS, saved, tensors_in
from hub_models import tokenizer as words_tokenizer
from typer.testing import CliRunner

from roots_dist.assembly.run import build_run
from roots_dist.cli.main import app
from roots_dist.config.load import load, to_yaml
from roots_dist.config.schema import Config
from roots_dist.errors import UserError
from roots_dist.learning.data import tokenizer as tokenizers
from roots_dist.storage.checkpoint.save import save
from roots_dist.storage.exchange import exporting, importing
from roots_dist.storage.exchange.compare import compare
from roots_dist.storage.exchange.exporting import architecture_for, checked, export_model
from roots_dist.storage.exchange.importing import import_model
from roots_dist.world.mesh import Mesh

ROOT = Path(__file__).parents[2]
TEXT = ["The state of the Union is strong .", "My fellow citizens , the Union ."] * 20
ENCODER = dict(norm_position="post", embedding_norm=True, activation="gelu")
LLAMA = dict(positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, tied_embeddings=False, kv_heads=1)
ELECTRA = dict(family="electra", segments=2, embedding_size=16, **ENCODER)
T5 = dict(family="t5", positions="relative", norm="rmsnorm", activation="relu", bias=False)


def a_run(folder: Path, tree: dict) -> Path:
    """As training leaves it after a step, weights stirred so that none is what it begins as."""
    sizes = dict(layers=2, hidden=24, heads=3, vocab=97)
    tree = tree | {"model": sizes | tree.get("model", {}), "data": {"seq_length": 16} | tree.get("data", {})}
    tree |= {"track": {"folder": str(folder)}}
    config = Config.model_validate(tree)
    mesh = Mesh.single()
    run = build_run(config, mesh, objective=object())
    draw = torch.Generator().manual_seed(3)
    for p in run.params:
        state = run.engine.read_state(p.name)
        weight = state["weight"] + 0.1 * torch.randn(state["weight"].shape, generator=draw)
        run.engine.write_state(p.name, state | {"weight": weight})
    folder.mkdir(exist_ok=True)
    save(folder, 1, run.engine, run.params, mesh, {})
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


MODELS = {
    "quickstart": ({"model": dict(positions="rotary")}, "GPTNeoXForCausalLM"),
    "gpt2": ({}, "GPT2LMHeadModel"),
    "bloom": ({"model": dict(positions="alibi", embedding_norm=True)}, "BloomForCausalLM"),
    "llama": ({"model": LLAMA}, "LlamaForCausalLM"),
    "roberta": ({"model": dict(family="bert", **ENCODER), "objective": {"name": "mlm"}}, "BertForMaskedLM"),
    "bert": ({"model": dict(family="bert", segments=2, **ENCODER), "objective": {"name": "mlm-nsp"}}, "BertForPreTraining"),
    "electra": ({"model": ELECTRA, "objective": {"name": "rtd"}}, "ElectraForPreTraining"),
    "t5": ({"model": T5, "objective": {"name": "spans"}}, "T5ForConditionalGeneration"),
    "classify": ({"objective": {"name": "classify"}, "finetune": {"labels": ["no", "yes"]}}, "GPT2ForSequenceClassification"),
    "bf16": ({"train": {"precision": "bf16"}}, "GPT2LMHeadModel"),
    "lora": ({"finetune": {"strategy": "lora", "lora_rank": 4, "lora_targets": ["query", "value", "out", "down"]}}, "GPT2LMHeadModel"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_run_becomes_the_architecture_of_its_features_with_the_same_logits(name, tmp_path):
    tree, architecture = MODELS[name]
    run = a_run(tmp_path / "run", tree)
    export_model(run, tmp_path / "export")
    assert settings(tmp_path / "export")["architectures"] == [architecture]
    found = compare(run, tmp_path / "export")
    assert found.difference < 1e-5 and found.largest > 0.1 and found.equal
    assert not any("lora" in tensor for tensor in tensors_in(tmp_path / "export"))


CONFIGS = {path.stem: load(path) for path in sorted((ROOT / "configs").glob("*.yaml"))}
WHOLE = [name for name, config in CONFIGS.items() if config.finetune.init_from is None]
"""Others take their model from where they start."""


@pytest.mark.parametrize("name", WHOLE)
def test_every_shipped_config_has_an_architecture(name):
    architecture_for(CONFIGS[name], {})


LACKS = [
    (dict(positions="sinusoidal"), "model.positions = 'sinusoidal': expected learned for GPT2LMHeadModel"),
    (dict(activation="swiglu"), "model.activation = 'swiglu': expected gelu_tanh or gelu or relu for GPT2LMHeadModel"),
    (dict(norm_position="post"), "model.norm_position = 'post': expected pre for GPT2LMHeadModel"),
    (dict(kv_heads=1), "model.kv_heads = 1: expected model.heads = 3 for GPT2LMHeadModel"),
    (dict(head_dim=10), "model.head_dim = 10: expected model.hidden / model.heads = 8 for GPT2LMHeadModel"),
    (
        dict(positions="alibi", embedding_norm=True, ffn=50),
        "model.ffn = 50: expected 4 × model.hidden = 96 for BloomForCausalLM",
    ),
    (dict(positions="rotary", norm="rmsnorm", activation="swiglu"), ""),
    (
        dict(positions="rotary", norm="rmsnorm"),
        "model.activation = 'gelu_tanh': expected swiglu or geglu for LlamaForCausalLM",
    ),
]


@pytest.mark.parametrize("model, told", LACKS, ids=[str(model) for model, _ in LACKS])
def test_a_feature_that_no_architecture_has_is_refused_by_name(model, told):
    config = Config.model_validate({"model": dict(layers=2, hidden=24, heads=3) | model})
    if not told:
        assert architecture_for(config, {})[0].model_type == "llama"
        return
    with pytest.raises(UserError) as error:
        architecture_for(config, {})
    assert (
        told in error.value.cli_message()
        and "Fix: " in error.value.cli_message()
        and "\n" not in error.value.cli_message()
    )


FAMILIES = {
    "gpt": ("bpe", {}, None, ["input_ids", "attention_mask"]),
    "bert": (
        "wordpiece",
        {"model": dict(family="bert", segments=2, **ENCODER), "objective": {"name": "mlm"}},
        ("[CLS]", "[SEP]"),
        ["input_ids", "token_type_ids", "attention_mask"],
    ),
    "t5": ("unigram", {"model": T5, "objective": {"name": "spans"}}, (None, "</s>"), ["input_ids", "attention_mask"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_tokenizer_gives_the_ids_of_the_run_and_the_familys_special_tokens(family, tmp_path):
    kind, tree, around, inputs = FAMILIES[family]
    mine = tokenizers.train(TEXT, 300, kind=kind)
    (tmp_path / "tokenizer.json").write_text(mine.json)
    model = {"vocab": mine.vocab} | tree.get("model", {})
    run = a_run(tmp_path / "run", tree | {"model": model, "data": {"tokenizer": str(tmp_path / "tokenizer.json")}})
    export_model(run, tmp_path / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert theirs(TEXT[0], add_special_tokens=False).input_ids == mine.encode(TEXT[0])
    whole = theirs(TEXT[0])
    assert list(whole) == inputs and theirs.model_max_length == 16
    expected = mine.encode(TEXT[0])
    if around:
        first, last = (token and theirs.convert_tokens_to_ids(token) for token in around)
        expected = [*([] if first is None else [first]), *expected, last]
        a, b = mine.encode("The Union"), mine.encode("strong")
        assert theirs("The Union", "strong").input_ids == [*expected[: first is not None], *a, last, *b, last]
    assert whole.input_ids == expected
    if family == "bert":
        assert theirs("The Union", "strong").token_type_ids == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        named = (theirs.pad_token, theirs.cls_token, theirs.sep_token, theirs.mask_token, theirs.unk_token)
        assert named == ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
        assert settings(tmp_path / "export")["pad_token_id"] == theirs.pad_token_id == 0
    else:
        assert settings(tmp_path / "export")["eos_token_id"] == theirs.eos_token_id == mine.end_of_document
    written = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"  # version 4 knows no other of version 5's
    assert compare(run, tmp_path / "export").equal


def test_bert_without_segments_whose_tokenizer_pads_as_robertas_is_roberta(tmp_path):
    words_tokenizer(SPECIALS["roberta"]).save(str(tmp_path / "tokenizer.json"))
    tree = {"model": dict(family="bert", **ENCODER), "objective": {"name": "mlm"}}
    run = a_run(tmp_path / "run", tree | {"data": {"tokenizer": str(tmp_path / "tokenizer.json")}})
    export_model(run, tmp_path / "export")
    assert settings(tmp_path / "export")["architectures"] == ["RobertaForMaskedLM"]
    assert settings(tmp_path / "export")["max_position_embeddings"] == 18
    assert compare(run, tmp_path / "export").equal


def test_a_model_of_conversations_takes_its_template_along(tmp_path):
    words_tokenizer(SPECIALS["gpt"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }} w9 {% endfor %}")
    finetune = {"chat_template": str(tmp_path / "mine.jinja")}
    data = {"tokenizer": str(tmp_path / "tokenizer.json")}
    run = a_run(tmp_path / "run", {"objective": {"name": "instruct"}, "data": data, "finetune": finetune})
    export_model(run, tmp_path / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert theirs.apply_chat_template([{"role": "user", "content": "w4"}], tokenize=False).strip() == "w4 w9"


def test_large_models_come_and_go_in_files_of_bounded_size(tmp_path, monkeypatch):
    theirs = saved("llama", tmp_path / "theirs")
    for module in (importing, exporting):
        monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    import_model(theirs, tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "export")
    files = sorted((tmp_path / "export").glob("*.safetensors"))
    assert len(files) > 3 and all(path.stat().st_size < 25_000 for path in files)
    assert len(list((tmp_path / "run").rglob("model-*.safetensors"))) > 3
    first, second = tensors_in(theirs), tensors_in(tmp_path / "export")
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert compare(tmp_path / "run", tmp_path / "export").equal


def test_a_bfloat16_export_is_the_rounded_model_and_reads_back(tmp_path):
    run = a_run(tmp_path / "run", {})
    assert "in bfloat16 (--dtype float32 rounds nothing), from" in export_model(run, tmp_path / "export", "bfloat16")
    assert settings(tmp_path / "export")["dtype"] == "bfloat16"
    assert {t.dtype for t in tensors_in(tmp_path / "export").values()} == {torch.bfloat16}
    said, fine = checked(run, tmp_path / "export", "bfloat16")
    assert fine and said.endswith("the rounding of bfloat16")
    import_model(tmp_path / "export", tmp_path / "again")
    said = export_model(tmp_path / "again", tmp_path / "wide")
    assert "in float32 (--dtype bfloat16 is what was imported), from" in said
    export_model(tmp_path / "again", tmp_path / "export again", "bfloat16")
    once, twice = tensors_in(tmp_path / "export"), tensors_in(tmp_path / "export again")
    assert all(torch.equal(once[n], twice[n]) for n in once)


def test_the_commands_say_what_they_did_and_a_wrong_export_ends_with_1(tmp_path, monkeypatch):
    theirs, run, export = saved("gpt2", tmp_path / "theirs"), tmp_path / "run", tmp_path / "export"
    done = CliRunner().invoke(app, ["import", str(theirs), str(run)])
    count = sum(t.numel() for t in tensors_in(theirs).values()) + (128 - 97) * 24  # padded words
    assert done.exit_code == 0 and f"{run}: GPT2LMHeadModel as model.family=gpt, {count:,} parameters" in done.stdout
    assert json.loads((run / "origin.json").read_text())["imported_from"] == str(theirs)
    done = CliRunner().invoke(app, ["export", str(run), str(export)])
    assert (
        done.exit_code == 0
        and "GPT2LMHeadModel in float32 (--dtype bfloat16 takes half the bytes), from" in done.stdout
        and "✓" in done.stdout
    )
    monkeypatch.setattr(exporting, "_whole", lambda weights, name, config: weights.get(name) * 1.01)
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "wrong")])
    assert done.exit_code == 1 and "✗: more than rounding" in done.stdout
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "unchecked"), "--no-check"])
    assert done.exit_code == 0 and "logits" not in done.stdout
    monkeypatch.setattr(exporting, "LARGE", 1)
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "large")])
    assert done.exit_code == 0 and "logits: not compared with the run's, because it has 1e+00 parameters" in done.stdout
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "alone")])
    assert done.exit_code == 0 and "because transformers is not installed (pip install 'roots_" in done.stdout


def test_an_export_is_refused_in_one_line_and_leaves_nothing(tmp_path):
    run = a_run(tmp_path / "run", {"data": {"tokenizer": str(tmp_path / "gone" / "tokenizer.json")}})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    cases = {
        ("full", "float32"): "expected a new folder, or an empty one",
        ("new", "float16"): "--dtype = 'float16': expected one of float32, bfloat16",
        ("new", "float32"): "data.tokenizer = '" + str(tmp_path / "gone" / "tokenizer.json"),
    }
    for (folder, dtype), told in cases.items():
        with pytest.raises(UserError) as error:
            export_model(run, tmp_path / folder, dtype)
        assert told in error.value.cli_message() and "\n" not in error.value.cli_message()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "run"]


def test_a_decoder_that_classifies_fills_up_with_its_end_so_that_no_text_ends_before_its_last_word(tmp_path):
    """It was token 0, a word of many tokenizers (GPT-2's is "!"): of texts that end with it the word before was
    read."""
    mine = words_tokenizer(["the", "<unk>", "<|endoftext|>"])
    mine.save(str(tmp_path / "tokenizer.json"))
    end = mine.token_to_id("<|endoftext|>")
    task = {"objective": {"name": "classify"}, "finetune": {"labels": ["no", "yes"]}}
    run = a_run(tmp_path / "run", task | {"data": {"tokenizer": str(tmp_path / "tokenizer.json")}})
    export_model(run, tmp_path / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert theirs.pad_token_id == settings(tmp_path / "export")["pad_token_id"] == end > 0
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "export"), tokenizer=theirs)
    texts = ["w1 the", "w1"]
    scores = [pipeline(text)[0]["score"] for text in texts]
    assert scores[0] != scores[1]
    assert [one["score"] for one in pipeline(texts, batch_size=2)] == pytest.approx(scores, rel=1e-4)
