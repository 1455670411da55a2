"""An export is served by `transformers serve` on the CPU, and the client of OpenAI gets from it what the run itself
says."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from test_exchange_exports import TEXT, a_run
from test_exchange_layouts import loaded

from roots_dist.learning.data import tokenizer as tokenizers
from roots_dist.learning.data.chat import open_chat
from roots_dist.runs.generate.decode import decode
from roots_dist.runs.generate.request import Request
from roots_dist.runs.generate.sampling import Sampling
from roots_dist.storage.exchange.exporting import export_model
from roots_dist.world.mesh import Mesh

NEW, PATIENCE_S = 12, 120


def answering(server: subprocess.Popen, url: str, log: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while True:
        assert server.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)


def test_transformers_serve_answers_the_client_of_openai_with_the_words_of_the_run(tmp_path):
    import openai

    mine = tokenizers.train(TEXT, 300)
    (tmp_path / "tokenizer.json").write_text(mine.json)
    model = dict(positions="rotary", vocab=mine.vocab)
    tree = {
        "model": model,
        "objective": {"name": "instruct"},
        "data": {"tokenizer": str(tmp_path / "tokenizer.json"), "seq_length": 64},
    }
    run = a_run(tmp_path / "run", tree)
    export_model(run, tmp_path / "export")
    messages = [{"role": "user", "content": "The Union"}]
    chat = open_chat(None, str(tmp_path / "tokenizer.json"), mine.end_token)
    prompts = [mine.encode("The state of"), mine.encode_with_specials(chat.prompt(messages))]
    _, passes = loaded(run, Mesh.single())
    answers = [
        decode(passes, [p], Request(max_tokens=NEW, sampling=Sampling(temperature=0)))[0][0].tokens for p in prompts
    ]
    assert mine.end_of_document not in [*answers[0], *answers[1]]  # nothing is left out
    words = [mine.decode(answer) for answer in answers]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tmp_path / "export")]
    command += ["--device", "cpu", "--port", str(port)]
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as said:
        server = subprocess.Popen(command, env=environ, stdout=said, stderr=subprocess.STDOUT)
    try:
        answering(server, f"http://127.0.0.1:{port}", log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=250, max_retries=0)
        how = dict(model=str(tmp_path / "export"), max_tokens=NEW, temperature=0)
        assert client.completions.create(prompt="The state of", **how).choices[0].text == words[0]
        found = client.chat.completions.create(messages=messages, **how).choices[0].message.content
        assert found == words[1]
    finally:
        server.terminate()
        server.wait(20)
