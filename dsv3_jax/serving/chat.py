"""Chat templates: renders conversations to prompts with a checkpoint's Jinja template, in a sandbox."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from dsv3_jax.config import ConfigError
from dsv3_jax.data.hf_tokenizer import TOKENIZER_CONFIG, read_tokenizer_config
from dsv3_jax.data.tokenizer_files import CHAT_TEMPLATE
from dsv3_jax.json_input import check_type, one_line
from dsv3_jax.serving.assistant import THINK, THINK_END
from dsv3_jax.serving.tools import describe_tools

_TAG = "\N{OBJECT REPLACEMENT CHARACTER}continue here\N{OBJECT REPLACEMENT CHARACTER}"


class ChatError(ValueError):
    """A conversation that the template can't render. The message is one line."""


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation."""

    text: str
    """The prompt, with special tokens by name."""
    thinking: bool | None
    """Whether the prompt ends within the assistant's reasoning; None if the assistant may open reasoning itself."""


class ChatTemplate:
    """A Jinja template, rendered as in transformers.

    Args:
      source: the template.
      special_tokens: variables of the template, such as bos_token.
      name: the name in error messages.

    Raises:
      ConfigError: the source isn't a valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str) -> None:
        self.source, self._special_tokens = source, dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
            names = jinja2.meta.find_undeclared_variables(_environment().parse(source))
        except jinja2.TemplateError as error:
            raise ConfigError(f"{name} is no Jinja template: {one_line(str(error))}") from None
        self._shows_tools = "tools" in names
        self.fenced_arguments = "```json" in source
        """Whether tool calls have the format of V3 and R1, with arguments in a code block, rather than V3.1's."""
        # OpenAI's arguments are JSON in a string. Templates that write them as JSON themselves need the value.
        self._parses_arguments = bool(re.search(r"arguments\s*\|\s*(tojson|items)|arguments\.items", source))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """Renders a conversation.

        Args:
          messages: in OpenAI's format: `role`, and `content` as text, or `tool_calls`.
          tools: in OpenAI's format. If the template ignores tools, they are described in the system message, in the
            words of V3.1's or V3's documentation.
          add_generation_prompt: append the beginning of the assistant's answer.
          continue_final_message: leave the last message open for the model to continue.
          extra: further variables of the template, such as `thinking`.

        Raises:
          ChatError: the template rejects the conversation.
        """
        try:
            talk = [self._message(message) for message in messages]
            if tools and not self._shows_tools:
                talk = _with_system(talk, describe_tools(tools, fenced=self.fenced_arguments))
        except (LookupError, TypeError, AttributeError):
            raise ChatError("tools or tool_calls aren't of OpenAI's form, each with a function and its name") from None
        if continue_final_message:
            if not talk or not isinstance(talk[-1].get("content"), str):
                raise ChatError("continue_final_message is set, but the last message has no text to continue")
            talk[-1]["content"] += _TAG
        variables = {**self._special_tokens, **(extra or {}), "messages": talk, "tools": tools or None}
        text = self._render(variables, add_generation_prompt)
        if continue_final_message:
            before, tag, _ = text.rpartition(_TAG)
            if not tag:
                raise ChatError("continue_final_message is set, but the template doesn't show the last message")
            return ChatPrompt(before, False)
        if not add_generation_prompt:
            return ChatPrompt(text, None)
        without = self._render(variables, False)
        # V3.1's template thinks only on its way to an answer, R1's adds to the prompt in every case.
        added = text[len(without) :] if text.startswith(without) else text[-64:]
        opened, closed = added.rfind(THINK), added.rfind(THINK_END)
        return ChatPrompt(text, None if opened == closed else opened > closed)

    def _render(self, variables: Mapping[str, Any], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(variables, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise ChatError(f"the chat template refuses these messages: {one_line(str(error))}") from None

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        message = {**message, "content": message.get("content")}
        if message["role"] == "developer":  # OpenAI's newer name; a template would leave it out in silence
            message["role"] = "system"
        if message["content"] is None and not message.get("tool_calls"):
            message["content"] = ""
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
        for name, other in (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")):
            if message.get(name) is not None:
                message.setdefault(other, message[name])
        if self._parses_arguments and "tool_calls" in message:
            message["tool_calls"] = [_parsed(call) for call in message["tool_calls"]]
        return message


def read_chat_template(directory: Path, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
    """Returns the chat template of a checkpoint, from `chat_template.jinja` or tokenizer_config.json; None if it has
    none.

    Args:
      directory: the checkpoint.
      special_tokens: the tokenizer's bos_token and eos_token; tokenizer_config.json may name more.

    Raises:
      ConfigError: it can't be read or isn't a valid template.
    """
    config = read_tokenizer_config(directory)
    named = {key: _text(value) for key, value in config.items() if key.endswith("_token")}
    special_tokens = {**special_tokens, **{key: value for key, value in named.items() if value is not None}}
    if (file := directory / CHAT_TEMPLATE).is_file():
        return template_file(file, special_tokens)
    source, name = config.get("chat_template"), f"{directory / TOKENIZER_CONFIG}: chat_template"
    if isinstance(source, list):
        listed = check_type(source, list[dict[str, str]], name, ConfigError)
        templates = {entry.get("name"): entry.get("template") for entry in listed}
        source = templates.get("default") or next(iter(templates.values()), None)
    source = check_type(source, str | None, name, ConfigError)
    return None if source is None else ChatTemplate(source, special_tokens, name)


def chat_template_beside(tokenizer: Path) -> ChatTemplate:
    """Returns the chat template beside a tokenizer's file, or in its folder. Raises ConfigError if there is none."""
    directory = tokenizer if tokenizer.is_dir() else tokenizer.parent
    template = read_chat_template(directory, {"bos_token": "", "eos_token": ""})
    if template is None:
        raise ConfigError(f"{directory} has no chat template, neither {CHAT_TEMPLATE} nor one in {TOKENIZER_CONFIG}")
    return template


def template_file(path: Path, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """Reads the chat template in a file. Raises ConfigError if it can't be read or isn't valid."""
    try:
        source = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the chat template {path} can't be read: {one_line(str(error))}") from None
    return ChatTemplate(source, special_tokens, str(path))


def _text(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Appends text to the first system message, which is added if there is none."""
    for i, message in enumerate(messages):
        if message["role"] == "system":
            changed = {**message, "content": f"{message['content']}\n\n{text}"}
            return [*messages[:i], changed, *messages[i + 1 :]]
    return [{"role": "system", "content": text}, *messages]


def _parsed(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        raise ChatError("the arguments of a tool call in messages must be JSON") from None
    return {**call, "function": {**call["function"], "arguments": value}}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's text for training; here it has no effect."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """`tojson` as in transformers, without the HTML escapes of Jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
