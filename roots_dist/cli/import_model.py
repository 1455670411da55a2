"""`roots import`: a Hugging Face model -> a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_model(
    folder: Annotated[
        Path, typer.Argument(metavar="HF_FOLDER", help="folder that save_pretrained wrote, or a download")
    ],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="new folder of the run, with a checkpoint of step 0")],
    generator: Annotated[
        Path | None, typer.Option(metavar="HF_FOLDER", help="ELECTRA: folder of the generator", show_default=False)
    ] = None,
) -> None:
    """Convert a Hugging Face model into a run, in one process; any layout can then load it.

    \b
    roots import downloads/gpt2 runs/gpt2-imported
    roots import downloads/electra-small-discriminator runs/electra \\
        --generator downloads/electra-small-generator

    \b
    Values of model_type in config.json that are read (docs/exchange.md):
    gpt2, bloom, llama, gpt_neox, opt, mistral, phi3, qwen2, qwen3,
    smollm3, granite, starcoder2, stablelm, falcon, gptj, phi, gemma,
    gemma2, gemma3_text, olmo, olmo2, olmo3, mixtral, qwen2_moe,
    qwen3_moe, olmoe, deepseek_v2, deepseek_v3, bert, roberta,
    xlm-roberta, camembert, distilbert, electra, t5, mt5.
    """
    from roots_dist.cli.terminal import busy
    from roots_dist.storage.exchange import importing

    with busy(f"importing {folder}"):
        done = importing.import_model(folder, run, generator)
    typer.echo(done)
