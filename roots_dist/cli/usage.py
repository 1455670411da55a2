"""A command line that cannot be understood, answered in one line with what to write instead.

words, the parser's complaint --usage_line--> `✗ --train.steps: no option has this name. Fix: write train.steps=5.`
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from roots_dist.config.other_names import key_for

OPTION = re.compile(r"No such option:? '?(-[^\s']*)'?")
"""As the parser says it; the library has written it with and without quotes and a colon."""
PUNCTUATION = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "--"})
"""What a word processor makes of quotes and dashes."""


def usage_line(message: str, words: Sequence[str]) -> str:
    """The parser's message as one line with its fix. words: the command line, without `roots`."""
    message = " ".join(message.split())
    command = words[0] if words and not words[0].startswith("-") else ""
    found = OPTION.match(message)
    if found is not None and "." in found[1]:
        right = _key(found[1], words)
        return f"✗ {found[1]}: no option has this name; keys of the config have no dashes. Fix: write {right}."
    if found is not None and (key := key_for(found[1].partition("=")[0])):
        right = f"{key}={_key(found[1], words).partition('=')[2]}"
        return f"✗ {found[1]}: no option has this name; it is a key of the config here. Fix: write {right}."
    plain = [word.translate(PUNCTUATION) for word in words]
    if found is not None and (odd := [word for word, typed in zip(words, plain) if word != typed]):
        return f"✗ {odd[0]}: a dash or quote that a word processor made. Fix: type {odd[0].translate(PUNCTUATION)}."
    if "No such command" in message and command:
        if Path(command).suffix in (".yaml", ".yml"):
            return f"✗ {command}: expected a command before the config. Fix: write roots train {command}."
        if command == "help":
            return "✗ help: expected a command. Fix: write roots --help, or roots COMMAND --help."
    where = f"roots {command} --help" if command and "No such command" not in message else "roots --help"
    return f"✗ {message.rstrip('.?')}{'?' if message.endswith('?') else '.'} Fix: see {where}."


def _key(option: str, words: Sequence[str]) -> str:
    """`--train.steps 5` and `--train.steps=5` as an override."""
    key, equals, value = option.lstrip("-").partition("=")
    if not equals:
        at = next((i for i, word in enumerate(words) if word.partition("=")[0] == option), len(words))
        given = words[at].partition("=")[2] if at < len(words) else ""
        after = words[at + 1] if at + 1 < len(words) else "VALUE"
        value = given or ("VALUE" if after.startswith("-") or "=" in after else after)
    return f"{key}={value}"
