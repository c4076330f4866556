"""Chat templates against transformers, and what they refuse."""

import json
from pathlib import Path

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.serving.chat import ChatError, ChatTemplate, read_chat_template

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/chat/expected.json").read_text())
SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>"}


def template(name):
    return ChatTemplate(GOLDEN["templates"][name], SPECIAL, name)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["template"])
def test_prompts_are_transformers(case):
    arguments = {"add_generation_prompt": False, **case["arguments"]}
    extra = {"thinking": arguments.pop("thinking")} if "thinking" in arguments else {}
    assert template(case["template"]).render(**arguments, extra=extra).text == case["text"]


USER = [{"role": "user", "content": "a <think> b"}]


@pytest.mark.parametrize(
    ("name", "how", "thinking"),
    [
        ("deepseek", {"extra": {"thinking": True}}, True),
        ("deepseek", {}, False),
        ("deepseek", {"add_generation_prompt": False}, None),
        ("chatml", {}, None),
    ],
)
def test_reasoning_that_the_prompt_opens(name, how, thinking):
    assert template(name).render(USER, **how).thinking is thinking


def test_an_assistants_beginning_is_continued_outside_reasoning():
    prompt = template("deepseek").render(
        [*USER, {"role": "assistant", "content": "{"}], add_generation_prompt=False, continue_final_message=True
    )
    assert prompt.thinking is False
    assert prompt.text.endswith("</think>{")


def test_templates_that_do_not_show_tools_get_them_in_the_systems_message():
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    text = template("deepseek").render([{"role": "developer", "content": "Be brief."}, *USER], [tool]).text
    assert text.startswith(
        "<bos>Be brief.\n\n## Tools\nYou have access to the following tools:\n\n### f\nDescription: d\n\n"
        'Parameters: {"type": "object"}\n\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n'
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>"
        "{additional_tool_calls}<｜tool▁calls▁end｜>\n\nWhere:\n"
    )
    assert template("deepseek").render(USER, [tool]).text.startswith("<bos>## Tools")
    assert "## Tools" not in template("chatml").render(USER, [tool]).text


def test_where_a_template_is_found(tmp_path):
    assert read_chat_template(tmp_path, SPECIAL) is None
    config = tmp_path / "tokenizer_config.json"
    render = lambda: read_chat_template(tmp_path, SPECIAL).render(USER).text
    config.write_text(json.dumps({"chat_template": "{{ bos_token }}one", "bos_token": {"content": "<s>"}}))
    assert render() == "<s>one"
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": "two{{ eos_token }}"}]
    config.write_text(json.dumps({"chat_template": several}))
    assert render() == "two<eos>"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert render() == "three"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must"),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        ("{{ messages[7].content.x }}", "refuses these messages"),
        ("{{ ().__class__.__bases__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "too big"),
    ],
)
def test_refusals_are_one_line(source, said):
    with pytest.raises(ChatError, match=said) as error:
        ChatTemplate(source, {}, "it").render(USER)
    assert "\n" not in str(error.value)


def test_templates_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"it is no Jinja template"):
        ChatTemplate("{% if %}", {}, "it")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: chat_template is 3"):
        read_chat_template(tmp_path, SPECIAL)


@pytest.mark.parametrize("tools", [[{}], "x", 5, [{"function": {}}]], ids=str)
def test_tools_that_are_none(tools):
    with pytest.raises(ChatError, match="OpenAI's form"):
        template("deepseek").render(USER, tools)


@pytest.mark.parametrize("calls", [[{}], "x", [{"function": {"name": "f"}}]], ids=str)
def test_calls_that_are_none(calls):
    with pytest.raises(ChatError, match="OpenAI's form"):
        template("chatml").render([*USER, {"role": "assistant", "tool_calls": calls}])


def test_arguments_that_are_no_json():
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}
    with pytest.raises(ChatError, match="must be JSON"):
        template("chatml").render([*USER, {"role": "assistant", "tool_calls": [call]}])
