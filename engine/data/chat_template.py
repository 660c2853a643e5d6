"""A chat template at work: the text of a conversation, and where in it each turn to train stands.

What the assistant writes begins where the prompt for it ends, and includes the token that ends the
turn. A template tells by `{% generation %}` blocks; where it has none, the places are found by
rendering parts of the conversation. Importing this file imports parts of transformers, which is
slow.
"""

import json
import re
from functools import cached_property, partial
from typing import Any, cast

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from engine.data.conversation import Conversation, Message
from engine.data.tokenizer import Tokenizer

Span = tuple[int, int]
"""First character, and one past the last."""

BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of a turn's reasoning; transformers hands it on under all of them."""

STAND_IN = "\ue0a7\ue0a8"
"""Stands for an assistant's text: characters for private use, which no text has."""


class ChatTemplate:
    """A template with a tokenizer's special tokens; renders as `apply_chat_template` does."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        self._text = text
        self._has_blocks = BLOCK.search(text) is not None
        self._render = partial(
            render_jinja_template, chat_template=text, **tokenizer.special_tokens
        )
        self._tokenizer = tokenizer
        self._end_tokens = _end_tokens(tokenizer)
        self._end_token = re.compile("|".join(map(re.escape, self._end_tokens)) or "(?!)")
        try:
            self._render(conversations=[])
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"data.chat_template: line {error.lineno} is not valid Jinja ({error.message}); "
                "mend the template, or use another"
            ) from error

    def render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Return the text, and the spans of the assistant's turns, in order.

        Without blocks there is one for each turn; with them as many as the template has. What the
        template cannot render is a ValueError with the reason.
        """
        try:
            text, spans = self._whole(conversation)
        except Exception as error:  # a template is a program, which may raise anything
            raise ValueError(f"the chat template fails: {error}") from error
        self._check_nothing_is_left_out(text, conversation)
        if self._has_blocks:
            return text, spans
        spans, behind = [], 0
        for number, message in enumerate(conversation.messages):
            if message["role"] == "assistant":
                span = self._find_turn(text, conversation, number)
                if not behind <= span[0] <= span[1]:
                    raise _cannot_tell(number)
                behind = span[1]
                spans.append(span)
        return text, spans

    def prompt(self, text: str) -> str:
        """Return the text of a chat in which the assistant is to answer a user's first words."""
        asked: list[Message] = [{"role": "user", "content": text}]
        return self._render(conversations=[asked], add_generation_prompt=True)[0][0]

    def end_of_turn_id(self) -> int | None:
        """Return the token with which the assistant ends a turn, None where it is not one."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        chat = Conversation(messages=turns, tools=None, is_trained=[True])
        try:
            text, spans = self.render(chat)
        except ValueError:  # one that takes no such chat may take others
            return None
        written = text[slice(*spans[-1])] if spans else ""
        token = next((token for token in self._end_tokens if written.endswith(token)), None)
        return None if token is None else self._tokenizer.encode(token)[0]

    def _whole(self, conversation: Conversation) -> tuple[str, list[Span]]:
        # Annotated as text alone, it returns a list of texts and one of spans.
        texts, spans = cast(
            tuple[list[str], list[list[Span]]],
            self._render(
                conversations=[conversation.messages],
                tools=conversation.tools,
                return_assistant_tokens_mask=self._has_blocks,
            ),
        )
        return texts[0], spans[0] if self._has_blocks else []

    def _check_nothing_is_left_out(self, text: str, conversation: Conversation) -> None:
        """Raise ValueError where the template passes over what it has no words for."""
        fields = {field for message in conversation.messages for field in message}
        fields |= {"tools"} if conversation.tools else set()
        for field in ("tools", "tool_calls", *REASONING):
            names = REASONING if field in REASONING else (field,)
            if field in fields and not any(name in self._text for name in names):
                raise ValueError(
                    f"the record has {field!r}, which the chat template does not write"
                )
        for number, message in enumerate(conversation.messages, start=1):
            content = message["content"].strip()
            if message["role"] == "assistant" or content in text:
                continue
            if json.dumps(content, ensure_ascii=False)[1:-1] not in text:
                raise ValueError(
                    f"the chat template leaves out turn {number}, of the role {message['role']}"
                )

    def _find_turn(self, text: str, conversation: Conversation, number: int) -> Span:
        """Return the span of turn `number`, an assistant's.

        It begins where the text of the turns before, rendered as a prompt, ends; or, where later
        turns change that text, where another turn in its place would differ. It ends likewise.
        """
        messages, tools = conversation.messages, conversation.tools
        others = (messages[:number], messages[number + 1 :])
        stand_in = {"role": "assistant", "content": STAND_IN}
        other = self._try([*others[0], stand_in, *others[1]], tools) or ""
        before, found, after = other.partition(STAND_IN)
        is_clear = bool(found) and STAND_IN not in after
        opened = self._try(messages[:number], tools, add_generation_prompt=True)
        if opened is not None and text.startswith(opened):
            start = len(opened)
        elif is_clear and text.startswith(before):
            start = self._behind_header(before)
        else:
            raise _cannot_tell(number)
        if is_clear and text.endswith(after):
            end = len(text) - len(after)
            if (token := self._end_token.match(text, _behind_blanks(text, end))) is not None:
                return start, token.end()
        closed = self._try(messages[: number + 1], tools)
        if closed is None or not text.startswith(closed):
            if is_clear and text.endswith(after):
                return start, len(text) - len(after)
            raise _cannot_tell(number)
        bare = closed.rstrip()
        return start, len(bare if bare.endswith(self._end_tokens) else closed)

    def _behind_header(self, before: str) -> int:
        """Return where a turn begins whose text is preceded by `before`.

        Blanks between the header and the text are the assistant's to write.
        """
        if not self._header:
            return len(before.rstrip(" "))
        for end in range(len(before), len(before.rstrip()) - 1, -1):
            if before.endswith(self._header, 0, end):
                return end
        return len(before)

    @cached_property
    def _header(self) -> str:
        """What the template adds to a prompt for the assistant to go on."""
        asked: list[Message] = [{"role": "user", "content": "?"}]
        plain = self._try(asked, None)
        prompt = self._try(asked, None, add_generation_prompt=True)
        if plain is None or prompt is None or not prompt.startswith(plain):
            return ""
        return prompt.removeprefix(plain)

    def _try(self, messages: list[Message], tools: list[Any] | None, **options: bool) -> str | None:
        """Return the text of part of a conversation, None where the template refuses it."""
        try:
            return self._render(conversations=[messages], tools=tools, **options)[0][0]
        except Exception:  # a template is a program, which may raise anything
            return None


def _end_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return what may end a turn: every token that text cannot spell, but the mark of a start."""
    tokens = {token for token in tokenizer.added_tokens if token.strip()}
    special = tokenizer.special_tokens
    if special.get("bos_token") != special.get("eos_token"):
        tokens.discard(special.get("bos_token", ""))
    return tuple(sorted(tokens, key=len, reverse=True))


def _behind_blanks(text: str, place: int) -> int:
    while text.startswith(" ", place):
        place += 1
    return place


def _cannot_tell(number: int) -> ValueError:
    return ValueError(
        f"the chat template does not show where turn {number + 1} begins and ends, because other "
        "turns change with it; mark what the assistant writes with {% generation %} and "
        "{% endgeneration %} in a copy of the template (data.chat_template)"
    )
