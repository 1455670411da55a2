"""A command line that cannot be understood, answered in one line with what to write instead.

words, the parser's complaint --usage_line--> `✗ --train.steps: no option has this name. Fix: write train.steps=5.`
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from roots_dist.config.other_names import DATA_RANKS, NO_DATA_RANKS, NUMBER_OF_PROCESSES, key_for

OPTION = re.compile(r"No such option:? '?(-[^\s']*)'?")
"""Message of the parser about an unknown option; the library has written it with and without quotes and a colon."""
SHORT = re.compile(r"-[a-zA-Z_]{2,}")
"""A name behind one dash, which the parser reads as letters that are options."""
WRONG = re.compile(r"Invalid value for '(-[^']+)': Input should be (.+?)\.?$")
"""Message of the parser about a value that an option does not take."""
UNIT = re.compile(r"(?i)\s*gi?b?$")
"""The unit of an option that is in GiB."""
BOUNDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "more than",
}
"""Words of the parser -> ours."""
WITH_PROCESSES = ("train", "finetune", "plan", "verify", "doctor")
"""Commands that have --processes."""
WITH_CONFIG = (
    "train",
    "finetune",
    "plan",
    "verify",
    "sample",
    "evaluate",
    "generate",
    "chat",
    "launch",
    "doctor",
    "export",
)
"""Commands that take keys of the config."""
OTHER_COMMANDS = {
    "prepare": ("tokenize", "preprocess", "encode", "data"),
    "init": ("new", "create", "config", "start"),
    "train": ("run", "fit", "pretrain", "resume"),
    "finetune": ("tune", "sft", "lora", "fine-tune"),
    "evaluate": ("score", "eval", "perplexity", "benchmark"),
    "generate": ("infer", "inference", "predict", "complete", "write"),
    "chat": ("talk", "ask"),
    "launch": ("submit", "sbatch", "slurm"),
    "doctor": ("diagnose", "health"),
    "ls": ("list", "runs"),
    "report": ("plot", "compare", "show"),
    "plan": ("estimate", "memory"),
    "verify": ("test", "prove", "proof"),
    "sample": ("inspect",),
    "schedule": ("pipeline", "draw"),
    "import": ("convert", "load", "from-hf"),
    "export": ("save", "to-hf", "push"),
}
"""Command -> words of other programs for it."""
COMMANDS = tuple(OTHER_COMMANDS)
ALIKE, SIMILAR = 0.9, 0.75
"""Likeness, of 1, from which one option is taken for another that is misspelt, before keys are looked at and after."""
OTHER_OPTIONS = {
    **dict.fromkeys(("--dry-run", "--dryrun", "--show-config", "--check-config", "--resolve"), ("--print-config",)),
    **dict.fromkeys(("--max-new-tokens", "--max_new_tokens", "--length", "--max-length"), ("--max-tokens",)),
    **dict.fromkeys(("--num-beams", "--num_beams", "--beam", "--beam-size"), ("--beams",)),
    **dict.fromkeys(("--num-return-sequences", "--num-samples", "--num_samples"), ("--samples",)),
    **dict.fromkeys(("--input", "--prompt-file", "--prompts-file"), ("--prompts",)),
    **dict.fromkeys(("-o", "--out", "--output-dir", "--outfile"), ("--output",)),
    **dict.fromkeys(("--silent", "-q"), ("--quiet",)),
    **dict.fromkeys(("--mem", "--memory", "--gpu-mem", "--vram"), ("--gpu-memory",)),
    **dict.fromkeys(("--vocab-size", "--vocab_size"), ("--vocab",)),
    **dict.fromkeys(("--num-workers", "--num_workers", "-j"), ("--workers",)),
}
"""Option of another program -> ours that mean the same, of which a command has one."""
PLACE = "VALUE"
"""Stands where a value is missing."""
PUNCTUATION = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "--"})
"""Quotes and dashes of a word processor -> the plain ones."""


def usage_line(message: str, words: Sequence[str], options: Sequence[str] = (), help_text: str = "") -> str:
    """The parser's message as one line with its fix. words: the command line, without `roots`. options, help_text:
    those of the command."""
    message = " ".join(message.split())
    command = words[0] if words and not words[0].startswith("-") else ""
    found = OPTION.match(message)
    if found is not None and (joined := next((word for word in words if SHORT.match(word)), "")).startswith(found[1]):
        words = [f"-{word}" if word == joined else word for word in words]
        found = re.match("(--[^=]+)", f"-{joined}")
    if found is not None and (ours := next((own for own in OTHER_OPTIONS.get(found[1], ()) if own in options), None)):
        return f"✗ {found[1]}: no option has this name. Fix: {_with_value(ours, found[1], words)}."
    if found is not None and "." in found[1]:
        right = _key(found[1], words)
        return f"✗ {found[1]}: no option has this name; keys of the config have no dashes. Fix: write {right}."
    plain = [word.translate(PUNCTUATION) for word in words]
    if found is not None and (odd := [word for word, typed in zip(words, plain) if word != typed]):
        return f"✗ {odd[0]}: a dash or quote that a word processor made. Fix: type {odd[0].translate(PUNCTUATION)}."
    if found is not None and (own := _own(found[1], options)) is not None:
        return f"✗ {found[1]}: no option has this name. Fix: {_with_value(own, found[1], words)}."
    if found is not None and (meant := _known_otherwise(found[1], words)) is not None:
        return f"✗ {found[1]}: no option has this name. Fix: {meant}."
    if found is not None and (own := _own(found[1], options, SIMILAR)) is not None:
        return f"✗ {found[1]}: no option has this name. Fix: {_with_value(own, found[1], words)}."
    if (wrong := WRONG.match(message)) is not None:
        return _wrong_value(wrong[1], wrong[2], words)
    if "No such command" in message and command:
        if Path(command).suffix in (".yaml", ".yml"):
            return f"✗ {command}: expected a command before the config. Fix: write roots train {command}."
        if command == "help":
            asked = next((word for word in words[1:] if word in COMMANDS), None)
            other = f"roots {asked} --help" if asked else "roots --help, or roots COMMAND --help"
            return f"✗ help: expected a command. Fix: write {other}."
        if (meant := _command_meant(command)) is not None:
            whole = " ".join(["roots", meant, *map(quote, words[1:])])
            return f"✗ No such command '{command}'. Did you mean '{meant}'? Fix: write {whole}."
    if message.startswith("Missing") and (example := _example(command, help_text)):
        left_out = re.match("Missing option '(--[a-z-]+)'", message)
        add = f"add {left_out[1]}, as in {example}" if left_out else f"write it as {example}, say"
        return f"✗ {message.rstrip('.')}. Fix: {add}; roots {command} --help tells more."
    where = f"roots {command} --help" if command and "No such command" not in message else "roots --help"
    return f"✗ {message.rstrip('.?')}{'?' if message.endswith('?') else '.'} Fix: see {where}."


def _command_meant(word: str) -> str | None:
    """The command that is meant by a misspelt one, by the beginning of one or by another program's; None if none is."""
    begun = [command for command in COMMANDS if command.startswith(word.lower())]
    other = next((command for command, words in OTHER_COMMANDS.items() if word.lower() in words), None)
    near = difflib.get_close_matches(word.lower(), COMMANDS, 1, 0.7)
    return begun[0] if len(begun) == 1 else other or (near[0] if near else None)


def _example(command: str, help_text: str) -> str:
    """The first command line of the help of a command; empty if there is none."""
    lines = help_text.replace("\\\n", "").splitlines()
    found = (" ".join(line.split()) for line in lines if line.strip().startswith(f"roots {command} "))
    return next(found, "")


def _wrong_value(option: str, complaint: str, words: Sequence[str]) -> str:
    """The line for an option's value that is no number, or one beyond its bounds."""
    from roots_dist.config.overrides import number_meant

    value, expected = _value(option, words), complaint.partition(",")[0]
    for theirs, ours in BOUNDS.items():
        expected = expected.replace(theirs, ours)
    plain = UNIT.sub("", value) if option.endswith("-memory") else value
    meant = number_meant(plain, whole="whole" in expected) if "number" in expected else None
    told = option if value == PLACE else f"{option} = {value}"
    return f"✗ {told}: expected {expected}. Fix: {f'write {option} {meant}' if meant else f'give {option} {expected}'}."


def _with_value(own: str, option: str, words: Sequence[str]) -> str:
    """Tell to write an option with the value that was written for another name."""
    value = _value(option, words)
    return f"write {own}" if value == PLACE else f"write {own} {value}"


def _own(option: str, options: Sequence[str], alike: float = ALIKE) -> str | None:
    """The option of the command that another spelling or a beginning of its name means; None if there is not one, or
    if launchers have this name for something else."""
    if option in NUMBER_OF_PROCESSES:
        return None
    name = option.lower().replace("_", "-")
    begun = [other for other in options if other.startswith(name) or (len(other) > 5 and name.startswith(other))]
    near = difflib.get_close_matches(name, options, 1, alike)
    return begun[0] if len(begun) == 1 else near[0] if near else None


def _known_otherwise(option: str, words: Sequence[str]) -> str | None:
    """The fix for an option of a launcher or of another trainer, or for a key without its section; None if it is none
    of these."""
    from roots_dist.config.foreign import advice_for
    from roots_dist.config.proposals import expected_of, instead, refusal_of
    from roots_dist.config.unknown_keys import keys_named, known_keys, nearest

    if option.replace("_", "-") in NUMBER_OF_PROCESSES and words[0] in WITH_PROCESSES:
        return f"write --processes {_value(option, words)}"
    if option in ("-c", "--config"):
        return f"write roots {words[0]} {_value(option, words)}"
    name = option.lstrip("-").replace("-", "_")
    if name in DATA_RANKS:
        return NO_DATA_RANKS
    value = _value(option, words)
    if (advice := advice_for(name, None if value == PLACE else value, {})) is not None:
        return advice
    if words[0] not in WITH_CONFIG:
        return None
    keys = [key for key in known_keys() if "." in key]
    of_name = keys_named(name)
    key = key_for(name) or (of_name[0] if len(of_name) == 1 else None if of_name else nearest(name, keys))
    if key is None:
        return None
    if value != PLACE:
        return instead(key, value)
    refusal = refusal_of(key, PLACE)
    return f"write {key}={PLACE}" + (f", where {PLACE} is {expected_of(refusal, key)}" if refusal else "")


def _key(option: str, words: Sequence[str]) -> str:
    """`--train.steps 5` and `--train.steps=5` as an override."""
    key, equals, value = option.lstrip("-").partition("=")
    return f"{key}={value if equals else _value(option, words)}"


def _value(option: str, words: Sequence[str]) -> str:
    """The value that was written for an option, behind it or behind a =."""
    at = next((i for i, word in enumerate(words) if word.partition("=")[0] == option), len(words))
    given = words[at].partition("=")[2] if at < len(words) else ""
    after = words[at + 1] if at + 1 < len(words) else PLACE
    is_other = re.match(r"-\D", after) is not None or "=" in after
    return given or (PLACE if is_other else after)
