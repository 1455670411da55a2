"""The learned part of a conversation: its examples, in token ids, each with a mark on what is a target.

    Conversation --chat.py--> text, spans of its answers --tokenizer, character offsets--> (ids, learned), …

The ids are those of the whole text: text that is tokenized in pieces has other ids, where a tokenizer puts a space
before each. A token is learned if it has a character of an answer, as in transformers' assistant mask.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from roots_dist.errors import DataError
from roots_dist.learning.data.chat import Chat, PastRewritten, Span, Turn
from roots_dist.learning.data.conversations import Conversation
from roots_dist.learning.data.messages import ChatMessage
from roots_dist.learning.data.remarks import Remarks
from roots_dist.learning.data.rows import Row
from roots_dist.learning.data.specials import Specials
from roots_dist.learning.data.tokenizer import Codec

Turns = Literal["all", "last", "each"]
"""finetune.turns: every answer of a conversation in one example; only the last; or an example for each."""
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names of the thoughts before an answer. Templates read the first, or the second."""


class ConversationEncoder:
    """Makes examples of the conversations of a file."""

    def __init__(self, chat: Chat, codec: Codec, specials: Specials, turns: Turns, remarks: Remarks):
        self.chat, self.codec, self.turns, self.remarks = chat, codec, turns, remarks
        tokens = filter(None, (codec.backend.id_to_token(int(i)) for i in np.flatnonzero(specials.special)))
        self.closing = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

    def examples(self, row: Row, conversation: Conversation) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """int32 ids and marks (1: learned) of each example. Raises DataError if the template refuses the row."""
        try:
            chat = self.chat.of(conversation.tools)
            texts = self._render(row, conversation, chat)
        except PastRewritten as error:
            fix = "learn the last answer with finetune.turns=last, or each in an example of its own with =each"
            raise self._refused(row, conversation, error, fix) from error
        except ValueError as error:
            fix = "correct this line, or give another finetune.chat_template"
            if "strftime_now" in str(error):
                fix = "say the day that the template writes, as finetune.chat_date=2026-01-31"
            raise self._refused(row, conversation, error, fix) from error
        for text, spans, _, is_prompted in texts:
            if not is_prompted:
                self.remarks.saw(
                    f"{chat.name} asks for answers with another text than it writes before them", row.place
                )
            ids, learned = encode_learned(text, spans, self.codec)
            if not learned.any():
                expected = f"an answer that {chat.name} marks with {{% generation %}}, or that the tokenizer keeps"
                raise row.error("conversation", text, expected, "give another finetune.chat_template")
            yield ids, learned

    def _refused(self, row: Row, conversation: Conversation, error: ValueError, fix: str) -> DataError:
        found = f"{len(conversation.messages)} messages"
        return row.error("conversation", found, f"one that the template can write ({error})", fix)

    def _render(self, row: Row, conversation: Conversation, chat: Chat) -> list[Turn]:
        tools = conversation.tools
        messages = [self._for_template(row, message, chat) for message in conversation.messages]
        learned = [i for i, m in enumerate(conversation.messages) if m.role == "assistant" and m.learned]
        if tools and not chat.reads("tools"):
            self.remarks.saw(f"column 'tools' is not read: {chat.name} has no tools", row.place)
        own: dict[int, Turn] = {}
        if self.turns == "all":
            found = [chat.all_answers(messages, learned, tools, self.closing)]
        else:
            chosen = learned[-1:] if self.turns == "last" else learned
            found = [chat.answer(messages, i, tools, self.closing) for i in chosen]
            own = dict(zip(chosen, found))
            if learned[-1] + 1 < len(messages):
                self.remarks.saw(
                    f"messages after the last answer are not read (finetune.turns={self.turns})", row.place
                )
            messages = messages[: learned[-1] + 1]
        for i, message in enumerate(messages):
            if (message.get("content") or "").strip() not in own.get(i, found[-1]).text:
                self.remarks.saw(f"{chat.name} leaves out or rewrites messages of role {message['role']}", row.place)
        return found

    def _for_template(self, row: Row, message: ChatMessage, chat: Chat) -> dict[str, Any]:
        """The message as templates read it, and as transformers prepares it: without what is null, its thoughts under
        every name."""
        role = message.role
        if role == "developer" and chat.developer != role:
            role = chat.developer
            self.remarks.saw(f"messages of role developer have role {role}: {chat.name} has no developer", row.place)
        others = dict(message.others)
        if others.get("tool_calls") and not chat.reads("tool_calls"):
            expected = f"a template that writes them, which {chat.name} does not"
            raise row.error("tool_calls", others["tool_calls"], expected, "give another finetune.chat_template")
        for key in others:
            names = REASONING_KEYS if key in REASONING_KEYS else (key,)
            if not any(map(chat.reads, names)):
                self.remarks.saw(f"key {key!r} of messages is not read: {chat.name} has no {key}", row.place)
        thoughts = next((others[key] for key in REASONING_KEYS if key in others), None)
        if thoughts is not None:
            others = {"thinking": thoughts, **others, "reasoning_content": thoughts}
        content = {} if message.content is None else {"content": message.content}
        return {"role": role, **content, **others}


def encode_learned(text: str, spans: Sequence[Span], codec: Codec) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids of a text, and 1 for each that has a character of one of the spans."""
    ids, offsets = codec.encode_with_offsets(text)
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    learned = np.zeros(len(ids), np.int32)
    for start, end in spans:
        learned[(starts < end) & (ends > start)] = 1
    return np.array(ids, np.int32), learned
