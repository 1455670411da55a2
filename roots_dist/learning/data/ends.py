"""The tokens that end what a model writes: asked by generation, evaluation and export, so that all stop alike.

SpecialTokens.eos, chat template --ends_of--> ids
"""

from __future__ import annotations

from datetime import datetime

from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.config.special_tokens import SpecialTokens
from roots_dist.errors import DataError
from roots_dist.learning.data.chat import Chat, open_chat
from roots_dist.learning.data.template_files import DEFAULT_NAME
from roots_dist.learning.data.tokenizer import Codec

QUESTION, ANSWER = "question", "answer"


def ends_of(config: Config, codec: Codec, specials: SpecialTokens) -> tuple[int, ...]:
    """Tokens that end a text of the run's model: eos, and what ends an answer in its chat template. The template counts
    if the run was trained on conversations, or if the tokenizer brings one and no generation_config.json says what ends
    a text."""
    chats = objective_of(config).chats
    if config.data.tokenizer is None or (specials.eos_is_listed and not chats):
        return specials.eos
    end = "" if specials.end is None else specials.text(specials.end)
    try:
        chat = open_chat(config.finetune.chat_template if chats else None, config.data.tokenizer, end, datetime.now)
    except DataError:
        if chats:
            raise
        return specials.eos  # a template that the run does not use
    is_meant = chats or chat.name != DEFAULT_NAME
    return tuple(dict.fromkeys([*specials.eos, *(answer_ends(chat, codec) if is_meant else ())]))


def answer_ends(chat: Chat, codec: Codec) -> tuple[int, ...]:
    """The special token that the template writes after an answer; none if it writes none there, or refuses a question
    and an answer alone."""
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    try:
        *_, turn = chat.turns(messages)
    except ValueError:
        return ()
    _, found, rest = turn.answer.rpartition(ANSWER)
    special = {i for i, token in codec.backend.get_added_tokens_decoder().items() if token.special}
    return tuple([i for i in codec.encode_with_specials(rest) if i in special][:1]) if found else ()
