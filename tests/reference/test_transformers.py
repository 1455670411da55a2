"""The single process, tied to an independent implementation: Hugging Face's GPT-2, Llama and BLOOM, in float64.

Parity tests compare layouts with one process; this file says that the one process is right.
"""

import pytest
import torch
import transformers

from roots_dist.config.schema import Config
from roots_dist.learning.models import gpt
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world.batch import MicroBatch
from roots_dist.world.sharding import initialize, parameters_of

VOCAB, SEQ, HIDDEN, HEADS, LAYERS = 97, 12, 32, 4, 3
QKV = ["attention.query", "attention.key", "attention.value"]


def config(**model) -> Config:
    sizes = dict(layers=LAYERS, hidden=HIDDEN, heads=HEADS, vocab=VOCAB, init_std=0.1)
    return Config.model_validate(
        {"model": sizes | model, "data": {"seq_length": SEQ}, "advanced": {"float64": True, "loss_chunk": 7}}
    )


def transposed(w):
    return w.t() if w.dim() == 2 else w


# Each family: our config, their model, and for a name of ours: the name of theirs and the view of it shaped like ours.


def gpt2():
    sizes = dict(vocab_size=VOCAB, n_positions=SEQ, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    parts = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attention.out": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }

    def where(piece, part, kind):
        if part in QKV:
            return f"transformer.{piece}.attn.c_attn.{kind}", lambda w: transposed(w.chunk(3, -1)[QKV.index(part)])
        return f"transformer.{piece}.{parts[part]}.{kind}", transposed

    ends = {
        "embed.position_embedding": "transformer.wpe.weight", "embed.tokens.weight": "transformer.wte.weight",
        "head.norm.weight": "transformer.ln_f.weight", "head.norm.bias": "transformer.ln_f.bias",
    }  # fmt: skip
    return config(), theirs, ends, where


def llama():
    sizes = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=80, num_hidden_layers=LAYERS)
    heads = dict(num_attention_heads=HEADS, num_key_value_heads=2, max_position_embeddings=SEQ, rope_theta=5000.0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, **heads, rms_norm_eps=1e-5, tie_word_embeddings=False)
    )
    parts = {
        **{f"attention.{ours}": f"self_attn.{ours[0]}_proj" for ours in ("query", "key", "value", "out")},
        **{f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
    }
    ends = {
        "embed.tokens.weight": "model.embed_tokens.weight",
        "head.weight": "lm_head.weight",
        "head.norm.weight": "model.norm.weight",
    }
    ours = config(
        kv_heads=2,
        ffn=80,
        positions="rotary",
        rope_theta=5000.0,
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        tied_embeddings=False,
    )
    return (
        ours,
        theirs,
        ends,
        lambda piece, part, kind: (f"model.{piece.replace('h.', 'layers.')}.{parts[part]}.{kind}", lambda w: w),
    )


def bloom():
    sizes = dict(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS)
    theirs = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes, hidden_dropout=0, attention_dropout=0))
    parts = {
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attention.out": "self_attention.dense",
        "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
    }  # fmt: skip

    def where(piece, part, kind):
        if part in QKV:  # rows ordered [heads, 3, head_dim]
            name = f"transformer.{piece}.self_attention.query_key_value.{kind}"
            return name, lambda w: w.unflatten(0, (HEADS, 3, -1))[:, QKV.index(part)]
        return f"transformer.{piece}.{parts[part]}.{kind}", lambda w: w

    ends = {
        "embed.tokens.weight": "transformer.word_embeddings.weight",
        "embed.norm.weight": "transformer.word_embeddings_layernorm.weight",
        "embed.norm.bias": "transformer.word_embeddings_layernorm.bias",
        "head.norm.weight": "transformer.ln_f.weight", "head.norm.bias": "transformer.ln_f.bias",
    }  # fmt: skip
    return config(positions="alibi", embedding_norm=True, heads=HEADS), theirs, ends, where


def pair(ours, name, theirs, ends, where):
    """Our tensor without padded words, and the view of theirs that holds the same numbers, in one shape."""
    if name in ends:
        target, view = ends[name], lambda w: w
        ours = ours[:VOCAB] if ours.shape[0] > VOCAB else ours
    else:
        _, i, *part, kind = name.split(".")
        target, view = where(f"h.{i}", ".".join(part), kind)
    view = view(theirs[target])
    return ours.reshape(view.shape), view


# Theirs computes some of Llama (norms, rotary angles) and BLOOM (softmax, GELU's constants) in float32 whatever the
# model's dtype; GPT-2 is float64 throughout.
BOUNDS = {gpt2: 1e-10, llama: 1e-6, bloom: 1e-6}


@pytest.mark.parametrize("family", BOUNDS, ids=lambda f: f.__name__)
def test_loss_and_gradients_equal_transformers(family):
    torch.manual_seed(0)
    ours, theirs, ends, where = family()
    theirs = theirs.double().eval()
    built: dict = {}
    for spec in gpt.pieces(ours, TensorParallel()):
        built[spec.name] = spec.build(built)
    pieces = [(n, p.double()) for n, p in built.items()]
    params = parameters_of(pieces)
    initialize(params, seed=5)
    weights = dict(theirs.named_parameters())
    with torch.no_grad():
        for p in params:
            p.tensor.add_(
                torch.randn(p.tensor.shape, dtype=torch.float64), alpha=0.1
            )  # norms away from 1, biases from 0
            mine, view = pair(p.tensor, p.name, weights, ends, where)
            view.copy_(mine)

    tokens, targets = torch.randint(0, VOCAB, (2, 2, SEQ))
    targets[0, :3] = -100
    batch = MicroBatch(tokens=tokens, targets=targets, sample_ids=torch.arange(2))
    payload = {}
    for _, piece in pieces:
        payload = piece(payload, batch)
    (term,) = payload.results
    (term.sum / term.count).backward()

    loss = torch.nn.functional.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    torch.testing.assert_close(term.sum / term.count, loss, rtol=BOUNDS[family], atol=BOUNDS[family])
    gradients = {name: w.grad for name, w in weights.items()}
    for p in params:
        mine, view = pair(p.tensor.grad, p.name, gradients, ends, where)
        torch.testing.assert_close(
            mine, view, rtol=BOUNDS[family], atol=BOUNDS[family], msg=lambda m, p=p: f"{p.name}: {m}"
        )
