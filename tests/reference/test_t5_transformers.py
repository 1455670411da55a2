"""T5 in one process, tied to an independent implementation: Hugging Face's T5ForConditionalGeneration, in float64.

Loss, every gradient, initial weights, the buckets of distances, and decoding with a cache.
"""

import pytest
import torch
import transformers

from roots_dist.config.schema import Config
from roots_dist.learning.models import t5
from roots_dist.learning.models.positions import Relative
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world.batch import IGNORE, PADDING, KVCache, MicroBatch
from roots_dist.world.sharding import initialize, parameters_of

VOCAB, SEQ, TARGET = 97, 12, 15
SIZES = dict(
    layers=3, decoder_layers=2, hidden=32, heads=4, head_dim=12, ffn=40, relative_buckets=8, relative_max_distance=10
)
VERSIONS = {
    "v1.0": (dict(activation="relu", tied_embeddings=True), dict(feed_forward_proj="relu")),
    "v1.1": (
        dict(activation="geglu", tied_embeddings=False),
        dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
}


def config(version: str, **model) -> Config:
    fixed = dict(family="t5", vocab=VOCAB, positions="relative", norm="rmsnorm", bias=False)
    return Config.model_validate(
        {
            "model": SIZES | fixed | VERSIONS[version][0] | model,
            "objective": {"name": "seq2seq"},
            "data": {"seq_length": SEQ, "target_seq_length": TARGET},
            "advanced": {"float64": True, "loss_chunk": 7, "norm_eps": 1e-6},
        }
    )


def their_model(version: str, exact_norms: bool):
    """exact_norms: theirs takes the variance in float32, whatever the model's dtype; torch's own norm does not."""
    sizes = dict(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=12,
        d_ff=40,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **VERSIONS[version][1]))
    if version == "v1.1":  # transformers 5 ties the weights of every config; real checkpoints of v1.1 hold both
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    for parent in [*model.modules()] if exact_norms else ():
        for name, child in parent.named_children():
            if type(child).__name__ == "T5LayerNorm":
                setattr(parent, name, torch.nn.RMSNorm(32, eps=1e-6))
    return model.double().eval()


def theirs_of(name: str, gated: bool) -> str:
    """The name of the same tensor there."""
    ends = {
        "embed.tokens.weight": "shared.weight",
        "bridge.norm.weight": "encoder.final_layer_norm.weight",
        "head.norm.weight": "decoder.final_layer_norm.weight",
        "head.weight": "lm_head.weight",
    }
    if name in ends:
        return ends[name]
    stack, _, i, *part, _ = name.split(".")
    mlp = 2 if stack == "decoder" else 1
    short = {"query": "q", "key": "k", "value": "v", "out": "o", "relative": "relative_attention_bias"}
    wide = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    match part:
        case ["norm1"]:
            inner = "layer.0.layer_norm"
        case ["cross_norm"]:
            inner = "layer.1.layer_norm"
        case ["norm2"]:
            inner = f"layer.{mlp}.layer_norm"
        case ["attention", which]:
            inner = f"layer.0.SelfAttention.{short[which]}"
        case ["cross", which]:
            inner = f"layer.1.EncDecAttention.{short[which]}"
        case ["mlp", which]:
            inner = f"layer.{mlp}.DenseReluDense.{wide[which]}"
    return f"{stack}.block.{i}.{inner}.weight"


def build(ours: Config):
    """Pieces and parameters, drawn by ourselves, all away from what they begin as."""
    built: dict = {}
    for spec in t5.pieces(ours, TensorParallel()):
        built[spec.name] = spec.build(built).double()
    params = parameters_of(built.items())
    initialize(params, seed=5)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in params:
            p.tensor.add_(torch.randn(p.tensor.shape, dtype=torch.float64, generator=draw), alpha=0.1)
    return built, params


def words(tensor: torch.Tensor) -> torch.Tensor:
    """Without padded ones."""
    return tensor[:VOCAB] if tensor.shape[0] > VOCAB else tensor


def copied(params, theirs, gated: bool) -> dict[str, torch.nn.Parameter]:
    """Give theirs our weights. Returns theirs by our names."""
    weights = dict(theirs.named_parameters())
    pairs = {p.name: weights[theirs_of(p.name, gated)] for p in params}
    assert len(pairs) == len(params) == len(weights)  # nothing of theirs is left over, shared ones counted once
    with torch.no_grad():
        for p in params:
            pairs[p.name].copy_(words(p.tensor))
    return pairs


def padded_batch() -> MicroBatch:
    """Two texts of which the first is short: its decoder reads more tokens than its encoder."""
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCAB, (2, SEQ), generator=draw)
    targets = torch.randint(VOCAB, (2, TARGET), generator=draw)
    documents = torch.zeros(2, SEQ, dtype=torch.int64)
    documents[0, 5:] = PADDING
    targets[1, -4:] = IGNORE
    decoder = torch.cat([torch.zeros(2, 1, dtype=torch.int64), targets.clamp(min=0)[:, :-1]], 1)
    return MicroBatch(
        tokens=tokens, targets=targets, sample_ids=torch.arange(2), document_ids=documents, decoder_tokens=decoder
    )


def run(built, batch: MicroBatch):
    payload = {}
    for piece in built.values():
        payload = piece(payload, batch)
    (found,) = payload.results
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("exact_norms, bound", [(True, 1e-11), (False, 1e-6)], ids=["norms in float64", "as it is"])
def test_loss_and_gradients_equal_transformers(version, exact_norms, bound):
    ours, theirs = config(version), their_model(version, exact_norms)
    built, params = build(ours)
    pairs = copied(params, theirs, ours.model.gated())
    batch = padded_batch()

    term = run(built, batch)
    (term.sum / term.count).backward()
    loss = theirs(input_ids=batch.tokens, attention_mask=(batch.document_ids >= 0).long(), labels=batch.targets).loss
    loss.backward()
    torch.testing.assert_close(term.sum / term.count, loss, rtol=bound, atol=bound)
    for p in params:
        found, expected = words(p.tensor.grad), pairs[p.name].grad
        assert expected.abs().max() > 100 * bound, p.name  # the comparison says something
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound, msg=lambda m, p=p: f"{p.name}: {m}")


@pytest.mark.parametrize("version", VERSIONS)
def test_decoding_word_by_word_with_a_cache_reads_the_same_logits(version):
    ours, theirs = config(version), their_model(version, exact_norms=True)
    built, params = build(ours)
    copied(params, theirs, ours.model.gated())
    batch, cache = padded_batch(), KVCache()
    expected = theirs(
        input_ids=batch.tokens, attention_mask=(batch.document_ids >= 0).long(), decoder_input_ids=batch.decoder_tokens
    ).logits
    encoder = [name for name in built if name == "embed" or name.startswith("encoder.")]
    payload = {}
    with torch.no_grad():
        for piece in built.values():
            piece.eval()
        for name in encoder:
            payload = built[name](payload, batch)
        for step in range(TARGET):
            one = batch.decoder_tokens[:, step : step + 1]
            reading = MicroBatch(
                tokens=batch.tokens,
                sample_ids=batch.sample_ids,
                document_ids=batch.document_ids,
                decoder_tokens=one,
                logits_at=0,
                cache=cache,
            )
            made = {} if step else payload  # the encoder is read once
            for name, piece in built.items():
                made = made if name in encoder else piece(made, reading)
            cache.length += 1
            torch.testing.assert_close(made.results[0].double(), expected[:, step], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 16), (10, 33), (51, 256), (60, 120), (128, 100), (4, 5)])
def test_buckets_equal_transformers(buckets, distance, causal):
    """Each distance falls into the same bucket; 51, 60 and 128 have distances right at a border."""
    from transformers.models.t5.modeling_t5 import T5Attention

    far = torch.arange(-3000, 3001)
    ours = Relative(config("v1.0", relative_buckets=buckets, relative_max_distance=distance), TensorParallel(), causal)
    expected = T5Attention._relative_position_bucket(far, not causal, buckets, distance)
    assert torch.equal(ours.bucket(far), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries, keys", [(range(9), 9), (range(7, 8), 8), (range(3, 9), 9), (range(5), 21)])
def test_each_query_and_key_get_the_bias_of_their_distance(queries, keys, causal):
    """One lookup for each distance, laid along diagonals, against one for each pair; and its gradient."""
    table = Relative(config("v1.0"), TensorParallel(), causal).double()
    torch.nn.init.normal_(table.weight)
    bias = table.bias(queries, keys, table.weight)
    pairs = torch.arange(keys) - torch.arange(queries.start, queries.stop).unsqueeze(1)  # [Q, S]
    expected = torch.stack([table.weight[table.bucket(pairs), head] for head in range(4)])
    assert torch.equal(bias, expected)
    weighed = torch.randn(bias.shape, dtype=bias.dtype)
    (found,), (grad,) = (torch.autograd.grad((b * weighed).sum(), table.weight) for b in (bias, expected))
    torch.testing.assert_close(found, grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("version", VERSIONS)
def test_initial_weights_are_drawn_as_transformers_draws_them(version):
    """Each matrix by its own standard deviation. The projection of v1.1 alone is not: T5's own code draws it by its
    inputs, as every dense layer (D^-0.5); transformers takes 1, with which the first loss is beyond all bounds."""
    large = dict(hidden=192, head_dim=24, heads=8, ffn=320, vocab=500, relative_buckets=64, relative_max_distance=128)
    ours = config(version, **large)
    built: dict = {}
    for spec in t5.pieces(ours, TensorParallel()):
        built[spec.name] = spec.build(built)
    params = parameters_of(built.items())
    initialize(params, seed=5)
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=500, d_model=192, d_kv=24, d_ff=320, num_layers=3, num_decoder_layers=2, num_heads=8,
            relative_attention_num_buckets=64, **VERSIONS[version][1],
        )
    )  # fmt: skip
    weights = dict(theirs.named_parameters())
    for p in params:
        expected = 192**-0.5 if p.name == "head.weight" else weights[theirs_of(p.name, ours.model.gated())].std().item()
        if p.tensor.dim() == 1:
            assert torch.equal(p.tensor, torch.ones_like(p.tensor)), p.name
        else:
            few = 5 * (2 * p.tensor.numel()) ** -0.5  # five standard errors, of ours and of theirs
            assert p.tensor.std().item() == pytest.approx(expected, rel=2 * few), p.name
