"""Tool calls as DeepSeek writes them: their marks, how tools are described to the model, and their grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
MARKS = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)
FENCED = "function"
"""Stands before the separator in the format of V3 and R1, where V3.1 has the tool's name."""
FENCE, FENCE_END = "\n```json\n", "\n```"


def describe_tools(tools: Sequence[Mapping[str, Any]], *, fenced: bool) -> str:
    """The text about tools that V3.1's documentation puts into the system's message.

    Args:
      tools: of OpenAI's form, `{"type": "function", "function": {"name", "description", "parameters"}}`.
      fenced: of the format of V3 and R1, `function<sep>NAME`, with the arguments in a block of code.
    """
    lines = ["## Tools\nYou have access to the following tools:\n"]
    for tool in tools:
        function = tool["function"]
        parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
        lines.append(
            f"### {function['name']}\nDescription: {function.get('description') or ''}\n\nParameters: {parameters}\n"
        )
    call = written_call("tool_call_name", "tool_call_arguments", fenced)
    chained = "with a newline as separator" if fenced else "directly without separators or spaces"
    lines.append(
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        f"{CALLS_BEGIN}{call}{{additional_tool_calls}}{CALLS_END}\n\nWhere:\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        f"- For multiple tool calls, chain them {chained}"
    )
    return "\n".join(lines)


def written_call(name: str, arguments: str, fenced: bool) -> str:
    """One call as the model writes it."""
    if fenced:
        return f"{CALL_BEGIN}{FENCED}{SEPARATOR}{name}{FENCE}{arguments}{FENCE_END}{CALL_END}"
    return f"{CALL_BEGIN}{name}{SEPARATOR}{arguments}{CALL_END}"
