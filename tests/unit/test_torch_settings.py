"""What a rank sets for torch, and says of it."""

import pytest

from roots_dist.config.schema import Config
from roots_dist.runs.ranks import torch_settings
from roots_dist.runs.train.banner import products_in_words


def test_segments_grow_on_a_gpu_unless_the_allocator_is_set_otherwise():
    assert torch_settings.settings("cuda", {})["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    for name in torch_settings.ALLOCATOR:
        assert not torch_settings.settings("cuda", {name: "max_split_size_mb:64"}).keys() & {*torch_settings.ALLOCATOR}
    assert [*torch_settings.settings("cpu", {})] == ["TORCH_FR_BUFFER_SIZE"]


def test_a_rank_exports_what_is_not_set(monkeypatch):
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")
    for name in torch_settings.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")  # so that it is taken back afterwards
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    torch_settings.export("cuda")
    assert torch_settings.in_words("cuda", tf32=True) == {
        "flight recorder": "7 operations",
        "allocator": "expandable_segments:True",
        "TF32": "on",
    }


@pytest.mark.parametrize(
    "precision, tf32, said", [("fp32", False, "without TF32"), ("fp32", True, "to TF32"), ("bf16", True, "in bf16")]
)
def test_the_opening_says_what_products_are_rounded_to(precision, tf32, said):
    assert said in products_in_words(Config.model_validate({"train": {"precision": precision}}), tf32)
