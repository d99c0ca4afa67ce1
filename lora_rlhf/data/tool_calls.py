# SPDX-License-Identifier: Apache-2.0
"""Tool calls in demonstrations, which the chat template renders, and lists of tools.

In a turn both are JSON texts: a dataset would give every call the arguments of all calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lora_rlhf.errors import first_line

TURN_KEYS = ("tools", "tool_calls")
"""Keys of a turn that hold JSON; `tools` stands on one turn of the prompt, for all of them."""

_NAMES = ("name", "tool_call_id")


def of_turn(turn: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys of a turn about tools, as text.

    Raises:
        ValueError: Its tool calls have another form than OpenAI's.
    """
    kept = {k: turn[k] for k in _NAMES if turn.get("role") == "tool" and _is_text(turn.get(k))}
    calls = turn.get("tool_calls")
    if not calls:
        return kept
    if turn.get("role") != "assistant" or not isinstance(calls, list):
        raise ValueError("tool_calls must be a list in an assistant's turn")
    return {**kept, "tool_calls": dump([_call(call) for call in calls])}


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not _is_text(function.get("name")):
        raise ValueError('a tool call must be {"function": {"name": ..., "arguments": {...}}}')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):  # as OpenAI sends them; templates expect a mapping
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise ValueError("the arguments of a tool call are not JSON") from None
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a tool call must be a mapping")
    whole = {k: v for k, v in call.items() if k in ("id", "type") and v is not None}
    return {"type": "function", **whole, "function": {**function, "arguments": arguments}}


def list_of_tools(value: Any) -> str:
    """Return a column `tools` as JSON; empty if there are none.

    Raises:
        ValueError: It is no list of mappings.
    """
    if isinstance(value, str) and value.strip():
        value = json.loads(value)
    if value in (None, "", []):
        return ""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("tools must be a list of JSON schemas")
    return dump(value)


def for_template(turns: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], Any]:
    """Return messages and tools as a chat template takes them."""
    tools, messages = None, []
    for turn in turns:
        message: dict[str, Any] = {k: v for k, v in turn.items() if v is not None}
        tools = json.loads(message.pop("tools")) if "tools" in message else tools
        if "tool_calls" in message:
            message["tool_calls"] = json.loads(message["tool_calls"])
        messages.append(message)
    return messages, tools


def answers_within(prompt: Any) -> Iterator[int]:
    """Yield the index of each turn of a prompt in which the assistant calls a tool."""
    if isinstance(prompt, list):
        yield from (i for i, turn in enumerate(prompt) if turn.get("tool_calls"))


def rendered(tokenizer: Any, turns: Sequence[Mapping[str, Any]], tail: str) -> tuple[str, str]:
    """Return the text that the template writes for an answer with tool calls, or in their context.

    Args:
        tail: What the template writes after an answer.

    Returns:
        The text, empty for an answer without calls; and why it cannot be trained, if it cannot.
    """
    messages, tools = for_template(turns)
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    try:
        opened = render(messages[:-1], tools=tools, add_generation_prompt=True)
        whole = render(messages, tools=tools)
        if tools and render(messages, tools=None) == whole:
            return "", "it does not write the list of tools"
    except Exception as error:  # whatever a template raises
        return "", f"it refuses them: {first_line(error)}"
    for message in messages[:-1]:
        if message["role"] == "tool" and message["content"].strip() not in opened:
            return "", "it does not write what a tool returned"
    calls = messages[-1].get("tool_calls")
    if not calls:
        return "", ""
    text = whole[len(opened) : len(whole) - len(tail)]
    if not whole.startswith(opened) or not whole.endswith(tail):
        return "", "it does not write them between its generation prompt and its end of turn"
    if not all(any(form in text for form in forms) for forms in _leaves(calls)):
        return "", "it does not write their names and arguments"
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    control = [str(t) for t in added if t.special and str(t) in text]
    if control:  # answers are encoded as text, so the token would be spelled out
        return "", f"it writes the control token {control[0]} in them"
    return text, ""


def _leaves(calls: list[dict[str, Any]]) -> Iterator[set[str]]:
    """Yield the forms in which each name and value of calls may be written."""

    def within(value: Any) -> Iterator[Any]:
        if isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                yield from within(one)
        else:
            yield value

    for call in calls:
        function = call["function"]
        for leaf in within([function["name"], function["arguments"]]):
            yield {str(leaf), dump(leaf).strip('"'), json.dumps(leaf).strip('"')}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def dump(value: Any) -> str:
    """Return JSON as turns hold it."""
    return json.dumps(value, ensure_ascii=False)
