"""A chat template is code: one that loops for ever or asks for all memory ends in one line, and in time."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import pytest

from roots_dist.errors import DataError
from roots_dist.learning.data import template_worker, templates
from roots_dist.learning.data.chat import open_chat
from roots_dist.learning.data.templates import Template, TemplateFailed, TemplateLimitError, _worker_of

MESSAGES = [{"role": "user", "content": "a" * 1000}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TOO_MUCH = {
    "a constant": "{{ 'a' * 2000000000 }}",
    "of a message": "{{ messages[0].content * 2000000 }}",
    "doubled": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a format": "{{ '%02000000000d' % messages | length }}",
    "a filter": "{{ messages[0].content | center(2000000000) }}",
    "a list": "{{ (messages * 2000000000) | length }}",
    "written": "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}",
}


@pytest.fixture
def chat(tmp_path: Path):
    def opened(source: str):
        (tmp_path / "chat_template.jinja").write_text(source)
        return open_chat(None, str(tmp_path / "tokenizer.json"), "</s>")

    return opened


@pytest.fixture
def quick(monkeypatch):
    """A limit of a second. Its worker is new, and that of other tests stays."""
    monkeypatch.setattr(templates, "PROGRAM", templates.PROGRAM.replace("main; main()", "main; main(1)"))
    new = templates.TemplateWorker()
    monkeypatch.setattr(templates, "_worker_of", lambda pid: new)


@pytest.mark.parametrize("case", TOO_MUCH)
def test_a_template_that_asks_for_gigabytes_ends_in_one_line_and_the_next_is_rendered(chat, case):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TemplateLimitError, match="^finetune.chat_template = '.*jinja': expected .* Fix: [^\n]*$"):
        chat(TOO_MUCH[case]).prompt(MESSAGES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1 << 19  # KiB
    assert chat("{{ messages[0].role }}").prompt(MESSAGES) == "user"


@pytest.mark.parametrize("source", [LOOP, "{{ 9 ** (9 ** 9) }}"], ids=["a loop", "a power, without a pause"])
def test_a_template_that_never_ends_is_ended(chat, quick, source):
    began = time.process_time()
    with pytest.raises(TemplateLimitError, match="it computes for more than"):
        chat(source).prompt(MESSAGES)
    assert time.process_time() - began < 5
    assert chat("{{ messages[0].role }}").prompt(MESSAGES) == "user"


def test_a_template_that_is_odd_is_refused_with_its_own_words(chat, tmp_path):
    for source in ("{% for %}", "{{ 'a' ", "{{" * 3000, "(" * 9 + "{% if " + "(" * 5000):
        with pytest.raises((DataError, TemplateLimitError), match="finetune.chat_template = "):
            chat(source)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a plain file"):
        open_chat(str(tmp_path / "pipe"), str(tmp_path / "tokenizer.json"), "</s>")
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "tokenizer_config.json")
    with pytest.raises(DataError, match="not a plain file"):
        open_chat(None, str(tmp_path / "piped" / "tokenizer.json"), "</s>")
    for source, words in {
        "{{ raise_exception('no system here') }}": "refuses it: no system here",
        "{{ ''.__class__.__mro__ }}": "refuses it: .*unsafe",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "refuses it: it calls itself too often",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "refuses it: ",
    }.items():
        with pytest.raises(ValueError, match=words):
            chat(source).prompt(MESSAGES)


def test_a_fork_has_a_worker_of_its_own_and_a_worker_ends_with_its_process():
    template = Template("{{ messages }}")
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ok = template.render({"messages": "child"}, None) == "child"
            os.write(theirs, str(_worker_of(os.getpid())._process.pid if ok else 0).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    told = int(os.read(ours, 100))
    os.waitpid(child, 0)
    assert told > 0 and template.render({"messages": "parent"}, None) == "parent"
    until = time.monotonic() + 60
    while os.path.exists(f"/proc/{told}") and time.monotonic() < until:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{told}")


def test_what_json_does_not_know_is_written_as_text_and_words_come_back_as_they_went():
    words = "ü \ud800 \n\u2028 ﷐ x"
    assert Template("{{ a }}|{{ b }}").render({"a": words, "b": Path("c")}, None) == f"{words}|c"
    with pytest.raises(TemplateFailed):
        Template("{{ a.b.c }}").render({"a": 1}, None)
    assert template_worker.MEMORY == 1 << 30
