"""Writes `chat/expected.json`: what transformers makes of chat templates. Run with an interpreter that has it.

The templates are written for this, with the constructs of DeepSeek's (namespaces, reasoning in the prompt) and others'.
"""

import json
from pathlib import Path

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% if not thinking is defined %}{% set thinking = false %}{% endif %}
{% set ns = namespace(system='', tool=false) %}
{%- for m in messages %}
  {%- if m['role'] == 'system' %}
    {%- set ns.system = ns.system + m['content'] %}
  {%- endif %}
{%- endfor %}
{{ bos_token }}{{ ns.system }}
{%- for m in messages %}
  {%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% endif %}
  {%- if m['role'] == 'assistant' %}
    {{- '<｜Assistant｜></think>' }}
    {%- if m['content'] is not none %}{{ m['content'].split('</think>')[-1] }}{% endif %}
    {%- for t in m['tool_calls'] or [] %}
      {{- '<｜tool▁call▁begin｜>' + t['function']['name'] + '<｜tool▁sep｜>' + t['function']['arguments'] }}
    {%- endfor %}
    {{- eos_token }}
  {%- endif %}
  {%- if m['role'] == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{{ '<think>' if thinking else '</think>' }}{% endif %}
"""

CHATML = """{%- if tools %}
<|im_start|>system
{% for tool in tools %}
{{ tool | tojson }}
{{ tool.function.parameters | tojson(indent=2) }}
{% endfor %}
<|im_end|>
{% endif %}
{% for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {%- if loop.index > 20 %}{% break %}{% endif %}
    <|im_start|>{{ message.role }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
{{ message.content or '' }}{% for call in message.tool_calls %}{{ call.function.arguments | tojson }}{% endfor %}
        {%- endgeneration %}
    {%- else %}
{{ message.content }}
    {%- endif %}
<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

PARAMETERS = {"type": "object", "properties": {"città": {"type": "string"}, "b": {"enum": ["<", "'"]}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Say <it>", "parameters": PARAMETERS}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"città": "Roma"}'}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <there> & 'you'\n"},
    {"role": "assistant", "content": "hm</think>Hello 👋"},
    {"role": "user", "content": "Weather?"},
]
CALLED = [
    *TALK,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "22°"},
]
CASES = [
    ("deepseek", {"messages": TALK, "add_generation_prompt": True}),
    ("deepseek", {"messages": TALK, "add_generation_prompt": True, "thinking": True}),
    ("deepseek", {"messages": TALK[1:3], "add_generation_prompt": False}),
    ("deepseek", {"messages": [*TALK[:2], {"role": "assistant", "content": "Hello "}], "continue_final_message": True}),
    ("deepseek", {"messages": CALLED, "add_generation_prompt": True}),
    ("chatml", {"messages": TALK, "add_generation_prompt": True}),
    ("chatml", {"messages": CALLED, "tools": TOOLS, "add_generation_prompt": True}),
    ("chatml", {"messages": [*TALK * 6, TALK[1]], "add_generation_prompt": False}),
]


def main() -> None:
    templates, expected = {"deepseek": DEEPSEEK, "chatml": CHATML}, []
    for name, case in CASES:
        given = json.loads(json.dumps(case))
        if name == "chatml":  # templates that write arguments as JSON are given the value
            for message in given["messages"]:
                for call in message.get("tool_calls", []):
                    call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        messages = given.pop("messages")
        texts, _ = render_jinja_template(
            [messages], chat_template=templates[name], bos_token="<bos>", eos_token="<eos>", **given
        )
        expected.append({"template": name, "arguments": case, "text": texts[0]})
    out = Path(__file__).parent / "chat/expected.json"
    out.parent.mkdir(exist_ok=True)
    content = {"transformers": transformers.__version__, "templates": templates, "cases": expected}
    out.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
