"""Special tokens come from a tokenizer's files, go with the run, and come back in its export: what begins a text, what
ends it, what an export stops at, and the numbers of lm-evaluation-harness. ChatML, Llama 2, Llama 3 and DeepSeek."""

import json

import pytest
import torch
import transformers
import yaml
from hub_models import llama
from hub_tokenizers import CHATML, STYLES, tokenizer_of, write_style

from roots_dist.checks.facts import gather
from roots_dist.config.run_config import config_of_run
from roots_dist.config.special_tokens import read_special_tokens
from roots_dist.learning.data.tasks import open_examples
from roots_dist.learning.objectives import make_objective
from roots_dist.runs.evaluate.harness_model import harness_model
from roots_dist.runs.generate.decode import decode
from roots_dist.runs.generate.generate import load_model
from roots_dist.runs.generate.prompts import open_prompt_encoder
from roots_dist.runs.generate.request import Request
from roots_dist.runs.generate.sampling import Sampling
from roots_dist.storage.exchange.exporting import export_model
from roots_dist.storage.exchange.importing import import_model
from roots_dist.world.mesh import Mesh

SEQ = 48
MESSAGES = [{"role": "user", "content": "the states"}]


def their_folder(style, folder, change=lambda model: None):
    """A random Llama with the tokenizer of this style, as it is downloaded."""
    made = tokenizer_of(style)
    torch.manual_seed(5)
    model = llama(vocab_size=made.get_vocab_size(), num_hidden_layers=1, max_position_embeddings=SEQ)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
        change(model)
    model.save_pretrained(folder)
    write_style(style, folder)
    return made


def settings(folder, name) -> dict:
    return json.loads((folder / name).read_text())


def ids(made, *tokens):
    return tuple(made.token_to_id(token) for token in tokens)


@pytest.fixture(scope="module", params=STYLES)
def styled(request, tmp_path_factory):
    """A style: its name, its tokenizer, and a place with the original, the run and its export."""
    place = tmp_path_factory.mktemp(request.param)
    made = their_folder(request.param, place / "theirs")
    import_model(place / "theirs", place / "run")
    export_model(place / "run", place / "export")
    return request.param, made, place


def test_an_import_knows_the_tokens_that_the_files_name(styled):
    style, made, place = styled
    s, found = STYLES[style], read_special_tokens(place / "run" / "tokenizer.json")
    assert found == read_special_tokens(place / "theirs" / "tokenizer.json")
    assert found.eos[0] == made.token_to_id(s.documents) and set(found.eos) == {*ids(made, s.documents, *s.ends)}
    assert found.before == ids(made, *s.before) and found.after == () and found.first == made.token_to_id(s.first)
    assert found.pad == (made.token_to_id(s.pad) if s.pad else None)
    assert found.add_bos == bool(s.before) and not found.add_eos
    assert f"eos {s.documents} = {found.eos[0]}" in found.line() and "(tokenizer_config.json)" in found.line()


def test_an_export_gives_all_of_them_back(styled):
    style, made, place = styled
    s = STYLES[style]
    assert settings(place / "export", "generation_config.json") == settings(place / "theirs", "generation_config.json")
    ours, theirs = (settings(place / side, "config.json") for side in ("export", "theirs"))
    assert [ours[f"{kind}_token_id"] for kind in ("bos", "eos")] == [
        theirs[f"{kind}_token_id"] for kind in ("bos", "eos")
    ]
    ours, theirs = (settings(place / side, "tokenizer_config.json") for side in ("export", "theirs"))
    kept = theirs.keys() - {"tokenizer_class", "chat_template"}
    assert {key: ours[key] for key in kept - {"model_input_names"}} == {
        key: theirs[key] for key in kept - {"model_input_names"}
    }
    assert settings(place / "export", "special_tokens_map.json") == settings(
        place / "theirs", "special_tokens_map.json"
    )
    assert (place / "export" / "chat_template.jinja").read_text() == s.template
    assert read_special_tokens(place / "export" / "tokenizer.json") == read_special_tokens(
        place / "run" / "tokenizer.json"
    )
    read = transformers.AutoTokenizer.from_pretrained(place / "export")
    assert (read.eos_token, read.bos_token) == (s.documents, s.before[0] if s.before else None)
    assert len(read) == made.get_vocab_size()


@pytest.mark.parametrize("written", ["in files", "in tokenizer_config.json"])
def test_templates_with_names_come_back(tmp_path, written):
    """One for tools beside the one for all else: Command R's and Hermes'."""
    given = {"default": CHATML, "tool_use": "{{ tools }}" + CHATML}
    their_folder("chatml", tmp_path / "theirs")
    tree = settings(tmp_path / "theirs", "tokenizer_config.json")
    tree.pop("chat_template", None)
    (tmp_path / "theirs" / "chat_template.jinja").unlink(missing_ok=True)
    if written == "in files":
        (tmp_path / "theirs" / "additional_chat_templates").mkdir()
        (tmp_path / "theirs" / "chat_template.jinja").write_text(given["default"])
        (tmp_path / "theirs" / "additional_chat_templates" / "tool_use.jinja").write_text(given["tool_use"])
    else:
        tree["chat_template"] = [{"name": name, "template": text} for name, text in given.items()]
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(tree))
    import_model(tmp_path / "theirs", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "export")
    for folder in ("theirs", "export"):
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == given


def test_ids_of_a_model_without_a_tokenizer_are_kept(tmp_path):
    their_folder("llama-3", tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "theirs" / name).unlink()
    import_model(tmp_path / "theirs", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "export")
    for name in ("config.json", "generation_config.json"):
        ours, theirs = settings(tmp_path / "export", name), settings(tmp_path / "theirs", name)
        assert (ours["bos_token_id"], ours["eos_token_id"]) == (theirs["bos_token_id"], theirs["eos_token_id"])
        assert theirs["eos_token_id"] == [301, 302, 303]


def test_generate_feeds_what_the_exports_tokenizer_does(styled):
    """BOS by tokenizer.json's post-processor (Llama 2 and 3) or by add_bos_token (DeepSeek), or none (ChatML)."""
    style, made, place = styled
    plain = open_prompt_encoder(config_of_run(place / "run").config, talks=False)
    read = transformers.AutoTokenizer.from_pretrained(place / "export")
    text = "the people of one union"
    assert plain.ids(text) == read(text).input_ids
    assert plain.ids(text)[: len(STYLES[style].before)] == list(ids(made, *STYLES[style].before))
    talking = open_prompt_encoder(config_of_run(place / "run").config, talks=True)
    rendered = read.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert talking.ids("the states") == read(rendered, add_special_tokens=False).input_ids


def scripted(made, end: int):
    """A model that answers anything with one word, then with `end`, and after that with the word again."""
    word = made.encode("people", add_special_tokens=False).ids[-1]

    def change(model):
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        table, out = model.model.embed_tokens.weight, model.lm_head.weight
        table.zero_(), out.zero_()
        table[:, 0], table[word, :2] = 1.0, torch.tensor([0.0, 1.0])
        out[word, 0] = out[end, 1] = 9.0
        model.model.norm.weight.fill_(1.0)

    return word, change


ENDS = [(style, end) for style, s in STYLES.items() for end in dict.fromkeys((s.documents, *s.ends))]


@pytest.mark.parametrize("style, end", ENDS)
def test_an_exported_chat_model_stops_where_the_run_stops(style, end, tmp_path):
    made = tokenizer_of(style)
    said = made.token_to_id(end)
    word, change = scripted(made, said)
    their_folder(style, tmp_path / "theirs", change)
    import_model(tmp_path / "theirs", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "export")
    assert spoken(tmp_path) == [word, said] == answered(tmp_path, 6)
    live = harness_model(load_model(config_of_run(tmp_path / "run").config, Mesh.single()))
    how = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    assert live.generate_until(requests("generate_until", [("the states", how)])) == [made.decode([word])]


def spoken(place) -> list[int]:
    """What the run answers in its chat template."""
    config = config_of_run(place / "run").config
    encoder = open_prompt_encoder(config, talks=True)
    request = Request(max_tokens=6, sampling=Sampling(temperature=0))
    ((answer,),) = decode(load_model(config, Mesh.single()), [encoder.ids("the states")], request, encoder.stops())
    return answer.tokens


def answered(place, most: int) -> list[int]:
    """What transformers answers with the export, sampled as its generation_config.json says."""
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "export")
    read = transformers.AutoTokenizer.from_pretrained(place / "export")
    given = read.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    found = model.generate(**given, max_new_tokens=most)
    return found[0, given["input_ids"].shape[1] :].tolist()


def test_a_model_trained_on_conversations_stops_at_its_templates_end(tmp_path):
    """ChatML taught to a model whose files name <|endoftext|> alone: the export names what ends an answer too, in
    generation_config.json as it came, with one more end."""
    made = tokenizer_of("chatml")
    said = made.token_to_id("<|im_end|>")
    word, change = scripted(made, said)
    their_folder("chatml", tmp_path / "theirs", change)
    text_end = made.token_to_id("<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        tree = settings(tmp_path / "theirs", name) | {"eos_token_id": text_end}
        (tmp_path / "theirs" / name).write_text(json.dumps(tree))
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (tmp_path / "theirs" / "special_tokens_map.json").unlink()
    import_model(tmp_path / "theirs", tmp_path / "run")
    export_model(tmp_path / "run", tmp_path / "plain")
    assert settings(tmp_path / "plain", "generation_config.json")["eos_token_id"] == text_end
    (tmp_path / "chatml.jinja").write_text(CHATML)
    tree = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    tree["objective"]["name"], tree["finetune"]["chat_template"] = "instruct", str(tmp_path / "chatml.jinja")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(tree))
    export_model(tmp_path / "run", tmp_path / "export")
    given = settings(tmp_path / "theirs", "generation_config.json")
    assert settings(tmp_path / "export", "generation_config.json") == given | {"eos_token_id": [text_end, said]}
    assert spoken(tmp_path) == [word, said] == answered(tmp_path, 6)


PAIRS = [("the people of", " the union"), ("", "the states are one"), ("one union and the", " states of"), ("is", "\n")]
ROLLING = [
    "the people of the united states are the people of one union and the union of the states " * 3,
    "one",
    "a b\n",
]
GREEDY = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
PROMPTS = [("the people of", GREEDY), ("our common defence", GREEDY), ("the", {"until": ["e"], "max_gen_toks": 5})]


def requests(kind, arguments) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def asked(lm) -> tuple[list, list, list]:
    return (
        [tuple(one) for one in lm.loglikelihood(requests("loglikelihood", PAIRS))],
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in ROLLING])),
        lm.generate_until(requests("generate_until", PROMPTS)),
    )


def test_lm_eval_gives_a_run_and_its_export_the_same_numbers(styled):
    from lm_eval.models.huggingface import HFLM

    _, _, place = styled
    live = harness_model(load_model(config_of_run(place / "run").config, Mesh.single()))
    hf = HFLM(pretrained=str(place / "export"), backend="causal", device="cpu", dtype="float32", batch_size=1)
    assert (live.max_length, live.prefix_token_id, live.eot_token_id) == (
        hf.max_length, hf.prefix_token_id, hf.eot_token_id,
    )  # fmt: skip
    (scores, rolling, texts), (their_scores, their_rolling, their_texts) = asked(live), asked(hf)
    assert [one[0] for one in scores] == pytest.approx([one[0] for one in their_scores], rel=1e-5, abs=1e-5)
    assert [one[1] for one in scores] == [one[1] for one in their_scores]
    assert rolling == pytest.approx(their_rolling, rel=1e-5, abs=1e-5)
    assert texts == their_texts and any(texts)


def test_a_tokenizer_with_names_of_its_own_can_be_fine_tuned(tmp_path):
    """DeepSeek's full-width names: it was refused, with advice that could not be followed."""
    their_folder("deepseek", tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "run")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [*MESSAGES, {"role": "assistant", "content": "one union"}]}) + "\n")
    config = config_of_run(tmp_path / "run").config.changed({"objective.name": "instruct", "data.train": str(rows)})
    assert {"end", "pad"} <= gather(config, 1).special_tokens
    assert make_objective(config).specials.end == read_special_tokens(tmp_path / "run" / "tokenizer.json").eos[0]
    (example,) = open_examples(str(rows), config).rows
    assert example.first[-1] == make_objective(config).specials.end and example.token_labels[-1] == 1
