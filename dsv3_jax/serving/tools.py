"""DeepSeek's format of tool calls: marks, description of tools to the model, and grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
MARKS = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)
FENCED = "function"
"""The text before the separator in the format of V3 and R1, where V3.1 has the name of the tool."""
FENCE, FENCE_END = "\n```json\n", "\n```"


def describe_tools(tools: Sequence[Mapping[str, Any]], *, fenced: bool) -> str:
    """Returns the description of tools for the system message, in the words of V3.1's documentation.

    Args:
      tools: in OpenAI's format, `{"type": "function", "function": {"name", "description", "parameters"}}`.
      fenced: use the format of V3 and R1, `function<sep>NAME`, with arguments in a code block.
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
    """Formats a call as the model writes it."""
    if fenced:
        return f"{CALL_BEGIN}{FENCED}{SEPARATOR}{name}{FENCE}{arguments}{FENCE_END}{CALL_END}"
    return f"{CALL_BEGIN}{name}{SEPARATOR}{arguments}{CALL_END}"
