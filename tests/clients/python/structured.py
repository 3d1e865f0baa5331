"""Schemas and tools: `.parse()`, the streaming helpers, calls and their results."""

import json

import openai
from pydantic import BaseModel, Field
from server import ASYNC, CLIENT, HI, MODEL


class City(BaseModel):
    name: str = Field(max_length=40)
    country: str = Field(max_length=40)
    inhabitants: int = Field(ge=0, le=99_999_999)


class Weather(BaseModel):
    """The weather in a city."""

    city: str = Field(max_length=40)
    unit: str = Field(pattern="^(celsius|fahrenheit)$")


PARIS = [{"role": "user", "content": "Tell me about Paris."}]
WEATHER = openai.pydantic_function_tool(Weather, name="weather")
FLAT = {"type": "function", **WEATHER["function"]}
ASK = dict(model=MODEL, temperature=0)


def check_chat_parses_into_a_model():
    answer = CLIENT.chat.completions.parse(**ASK, messages=PARIS, response_format=City, max_tokens=200)
    assert isinstance(answer.choices[0].message.parsed, City) and answer.choices[0].finish_reason == "stop", answer


def check_a_cut_answer_is_told_as_such():
    try:
        CLIENT.chat.completions.parse(**ASK, messages=PARIS, response_format=City, max_tokens=3)
    except openai.LengthFinishReasonError as error:
        assert error.completion.usage.completion_tokens == 3
        return
    raise AssertionError("no LengthFinishReasonError")


def check_the_streaming_helper_parses():
    with CLIENT.chat.completions.stream(**ASK, messages=PARIS, response_format=City, max_tokens=200) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    done = [event for event in events if event.type == "content.done"]
    assert len(done) == 1 and isinstance(done[0].parsed, City)
    assert final.choices[0].message.parsed == done[0].parsed
    whole = CLIENT.chat.completions.parse(**ASK, messages=PARIS, response_format=City, max_tokens=200)
    assert whole.choices[0].message.parsed == done[0].parsed


def check_json_mode_gives_an_object():
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": City.model_json_schema()}}
    for kind in (schema, {"type": "json_object"}):
        answer = CLIENT.chat.completions.create(**ASK, messages=PARIS, response_format=kind, max_tokens=60)
        content, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert content.lstrip().startswith("{"), content
        if reason == "stop":
            assert isinstance(json.loads(content), dict)


def check_chat_parses_the_arguments_of_a_call():
    ask = dict(**ASK, messages=PARIS, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=200)
    answer = CLIENT.chat.completions.parse(**ask)
    [call] = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather) and answer.choices[0].finish_reason == "tool_calls"
    with CLIENT.chat.completions.stream(**ask) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    kinds = {event.type for event in events}
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds, kinds
    [streamed] = final.choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments and streamed.id
    assert streamed.function.parsed_arguments == call.function.parsed_arguments


def check_several_calls_are_told_apart_in_a_stream():
    ask = dict(**ASK, messages=PARIS, tools=[WEATHER], tool_choice="required", max_tokens=400)
    whole = CLIENT.chat.completions.create(**ask).choices[0].message.tool_calls
    calls = {}
    for chunk in CLIENT.chat.completions.create(**ask, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or []:
            if piece.index not in calls:
                assert piece.id and piece.type == "function" and piece.function.name, piece
            calls.setdefault(piece.index, []).append(piece.function.arguments)
    assert list(calls) == list(range(len(whole))) and whole
    assert ["".join(pieces) for pieces in calls.values()] == [call.function.arguments for call in whole]


def check_a_result_goes_back_to_the_model():
    named = {"type": "function", "function": {"name": "weather"}}
    first = CLIENT.chat.completions.create(**ASK, messages=PARIS, tools=[WEATHER], tool_choice=named, max_tokens=200)
    call = first.choices[0].message.tool_calls[0]
    messages = [*PARIS, first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 20 degrees"}]
    second = CLIENT.chat.completions.create(**ASK, messages=messages, tools=[WEATHER], tool_choice="none", max_tokens=16)
    assert second.choices[0].message.content and not second.choices[0].message.tool_calls


def check_responses_parse_into_a_model():
    answer = CLIENT.responses.parse(**ASK, input="Tell me about Paris.", text_format=City, max_output_tokens=200)
    assert isinstance(answer.output_parsed, City) and answer.status == "completed", answer
    with CLIENT.responses.stream(**ASK, input="Tell me about Paris.", text_format=City, max_output_tokens=200) as stream:
        done = [event for event in stream if event.type == "response.output_text.done"]
        final = stream.get_final_response()
    assert len(done) == 1 and done[0].parsed == final.output_parsed == answer.output_parsed


def check_responses_call_a_tool_and_go_on():
    ask = dict(**ASK, input="Tell me about Paris.", tools=[FLAT], tool_choice="required", parallel_tool_calls=False)
    first = CLIENT.responses.create(**ask, max_output_tokens=200)
    [call] = [item for item in first.output if item.type == "function_call"]
    assert call.name == "weather" and call.call_id and Weather.model_validate_json(call.arguments), call
    with CLIENT.responses.stream(**ask, max_output_tokens=200) as stream:
        events = list(stream)
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert deltas == done.arguments == call.arguments
    added = [event.item for event in events if event.type == "response.output_item.added"]
    assert [item.type for item in added if item.type == "function_call"] == ["function_call"]
    items = [
        {"role": "user", "content": "Tell me about Paris."},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    second = CLIENT.responses.create(**ASK, input=items, tools=[FLAT], tool_choice="none", max_output_tokens=16)
    assert second.output_text and second.usage.input_tokens > 0


async def check_parsing_without_waiting():
    answer = await ASYNC.chat.completions.parse(**ASK, messages=PARIS, response_format=City, max_tokens=200)
    assert isinstance(answer.choices[0].message.parsed, City)
    async with ASYNC.chat.completions.stream(**ASK, messages=HI, max_tokens=8) as stream:
        kinds = [event.type async for event in stream]
    assert "content.delta" in kinds, kinds
    response = await ASYNC.responses.parse(**ASK, input="Tell me about Paris.", text_format=City, max_output_tokens=200)
    assert isinstance(response.output_parsed, City)
    async with ASYNC.responses.stream(**ASK, input="Hi", max_output_tokens=8) as stream:
        events = [event async for event in stream]
    assert events[0].type == "response.created" and events[-1].type in ("response.completed", "response.incomplete")


def check_answers_have_names():
    raw = CLIENT.chat.completions.with_raw_response.create(**ASK, messages=HI, max_tokens=1)
    answer = raw.parse()
    assert raw.headers["x-request-id"] and answer._request_id == raw.headers["x-request-id"]
    mine = CLIENT.chat.completions.with_raw_response.create(
        **ASK, messages=HI, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert mine.headers["x-request-id"] == "mine-1"
