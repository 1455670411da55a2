"""`roots chat RUN`: a conversation in a terminal, in one process. The history is kept, and answers are shown as they
are generated.

    line --history--> chat template (learning/data/chat.py) --as much as fits--> decode.py --> answer, history

A model that was not trained on conversations gets the default template, and is stopped where it starts to write the
user's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from roots_dist.assembly.passes import Passes
from roots_dist.config.families import decoders
from roots_dist.config.objectives import writing_decoders
from roots_dist.config.records import family_of, objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem, present
from roots_dist.learning.data.template_files import DEFAULT_NAME
from roots_dist.runs.generate.check_options import check_options
from roots_dist.runs.generate.decode import decode
from roots_dist.runs.generate.generate import load_model
from roots_dist.runs.generate.options import GenerateOptions
from roots_dist.runs.generate.prompts import PromptEncoder, open_prompt_encoder
from roots_dist.runs.generate.request import Request, make_request
from roots_dist.runs.generate.stops import Stops, TextStreamer
from roots_dist.world.mesh import Mesh

USER_TURN = ("\nuser:", "user:")
"""Start of a user turn in the default template; leading white space is not part of an answer."""
HELP = "/reset forgets the conversation, /exit ends it; Ctrl-C stops an answer.\n"
ReadLine = Callable[[], str]
"""Returns the user's next line. Raises EOFError at the end."""
Show = Callable[[str], None]


def check(config: Config, options: GenerateOptions) -> None:
    """Raise UserError if the run cannot hold a conversation. Called before the model is loaded."""
    p, family, name, answer = config.parallel, config.model.family, config.objective.name, objective_of(config).answer
    problems = []
    if not family_of(config).is_decoder:
        fix = "fill masks in with" if answer == "fill" else "use"
        expected = f"{decoders()}, because a conversation needs a decoder"
        problems.append(Problem(key="model.family", found=family, expected=expected, fix=f"{fix} roots generate"))
    elif answer != "write":
        expected = f"one that writes ({writing_decoders()})"
        problems.append(Problem(key="objective.name", found=name, expected=expected, fix="use roots generate"))
    if p.least_ranks() > 1:
        expected, fix = "1, because a conversation runs in one process", "leave the layout out, or use roots generate"
        problems.append(Problem(key=" × ".join(p.factors()), found=p.least_ranks(), expected=expected, fix=fix))
    if problems:
        raise ConfigError(problems)
    check_options(options, config)
    open_prompt_encoder(config, talks=True)


def chat(config: Config, mesh: Mesh, *, options: GenerateOptions, read_line: ReadLine, show: Show) -> None:
    """Converse until the user's last line."""
    if mesh.world.size > 1:
        expected, fix = "1, because a conversation runs in one process", "start it without a launcher"
        raise ConfigError([Problem(key="world size", found=mesh.world.size, expected=expected, fix=fix)])
    encoder = open_prompt_encoder(config, talks=True)
    not_taught = present(encoder.chat).name == DEFAULT_NAME and not objective_of(config).chats
    stops = encoder.stops((*options.stop, *(USER_TURN if not_taught else ())))
    conversation = ChatSession(load_model(config, mesh), encoder, make_request(options, config), stops, show)
    show(f"{Path(config.track.folder)}: {HELP}")
    while True:
        try:
            line = (
                read_line().encode(errors="replace").decode().strip()
            )  # undecodable bytes arrive as halves of surrogate pairs
        except EOFError:
            return
        except KeyboardInterrupt:
            show("\n")
            continue
        if line == "/exit":
            return
        if line == "/reset":
            conversation.history.clear()
            show("(forgotten)\n")
        elif line.startswith("/"):
            show(HELP)
        elif line:
            conversation.reply_to(line)


@dataclass
class ChatSession:
    passes: Passes
    encoder: PromptEncoder
    request: Request
    stops: Stops
    show: Show
    history: list[dict[str, str]] = field(default_factory=list)
    """Messages of the user and the assistant in turn."""
    turns: int = 0
    """Number of answers so far; each uses another seed."""

    def reply_to(self, line: str) -> None:
        """Answer, and append both to the history. The oldest turns are dropped when the model cannot hold all of it."""
        self.history.append({"role": "user", "content": line})
        ids, forgotten, limit = self.encoder.conversation(self.history), 0, self.encoder.positions
        room = limit - min(self.request.max_tokens, limit // 2)  # for everything but the answer
        while len(ids) > room and len(self.history) > 1:
            del self.history[:2]
            forgotten += 1
            ids = self.encoder.conversation(self.history)
        if len(ids) > room:
            self.history.pop()
            self.show(
                f"(this is {len(ids)} tokens; the model holds {limit}, {room} of them besides an answer; shorten it)\n"
            )
            return
        if forgotten:
            oldest = f"the oldest {forgotten} turns are" if forgotten > 1 else "the oldest turn is"
            self.show(f"({oldest} forgotten: the model holds {limit} tokens)\n")
        self.history.append({"role": "assistant", "content": self._answer(ids, limit - len(ids))})

    def _answer(self, ids: list[int], room: int) -> str:
        request = replace(
            self.request, max_tokens=min(self.request.max_tokens, room), seed=self.request.seed + self.turns
        )
        answer: Sequence[int] = ()
        shown = TextStreamer(self.stops, (), _without_leading_space(self.show))

        def on_token(number: int, tokens: Sequence[int]) -> None:
            nonlocal answer
            answer = tokens
            shown(number, tokens)

        with suppress(KeyboardInterrupt):  # the answer so far counts
            decode(self.passes, [ids], request, self.stops, on_token=on_token)
        text = self.stops.text(answer)
        shown.finish(text.rstrip())
        self.show("\n")
        self.turns += 1
        return text.strip()


def _without_leading_space(show: Show) -> Show:
    """Drop the white space at the beginning of an answer."""
    started = False

    def shown(text: str) -> None:
        nonlocal started
        text = text if started else text.lstrip()
        if text:
            started = True
            show(text)

    return shown
