"""Structured output and tool calls through `pydantic-ai` and `instructor`."""

import os

import instructor
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.messages import ModelMessagesTypeAdapter, ToolCallPart, ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

MODEL, BASE = os.environ["MODEL"], os.environ["BASE_URL"] + "/v1"
SETTINGS = {"temperature": 0, "max_tokens": 200, "frequency_penalty": 0.4, "parallel_tool_calls": False}


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=40)
    country: str = Field(max_length=40)
    inhabitants: int = Field(ge=0, le=99_999_999)


def server(kind=OpenAIChatModel):
    return kind(MODEL, provider=OpenAIProvider(base_url=BASE, api_key="EMPTY"))


def parts(result, kind):
    return [part for message in result.all_messages() for part in message.parts if isinstance(part, kind)]


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
@pytest.mark.parametrize("how", [NativeOutput, ToolOutput])
def test_an_agent_answers_with_a_schema(kind, how):
    agent = Agent(server(kind), output_type=how(City), model_settings=SETTINGS)
    result = agent.run_sync("Tell me about Paris.")
    assert isinstance(result.output, City)
    assert result.usage.input_tokens > 0 and result.usage.output_tokens > 0


async def test_an_agent_streams_what_it_answers():
    agent = Agent(server(), output_type=NativeOutput(City), model_settings=SETTINGS)
    async with agent.run_stream("Tell me about Paris.") as result:
        seen = [partial async for partial in result.stream_output(debounce_by=None)]
    assert len(seen) > 1 and all(isinstance(city, City) for city in seen[-1:]), seen


def test_an_agent_calls_a_tool_and_reads_what_it_gave():
    # The model calls nothing of its own accord, so it is told to at first.
    agent = Agent(
        server(), model_settings=lambda run: SETTINGS | ({"tool_choice": ["weather"]} if run.run_step == 1 else {})
    )
    asked = []

    @agent.tool_plain(name="weather")
    def weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return "sunny"

    first = agent.run_sync("What is the weather in Paris?")
    assert asked and all(isinstance(city, str) for city in asked)
    assert [part.tool_name for part in parts(first, ToolCallPart)][0] == "weather"
    assert parts(first, ToolReturnPart)[0].content == "sunny"
    assert isinstance(first.output, str) and ModelMessagesTypeAdapter.dump_json(first.all_messages())


# Not `Mode.JSON`: it tells the schema in words and sends `json_object`, and a model this small does not obey words.
@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA])
def test_instructor_fills_a_model(mode):
    client = instructor.from_openai(OpenAI(base_url=BASE, api_key="EMPTY", max_retries=0), mode=mode)
    city = client.chat.completions.create(
        model=MODEL,
        response_model=City,
        messages=[{"role": "user", "content": "Tell me about Paris."}],
        temperature=0,
        frequency_penalty=0.4,
        max_tokens=200,
        max_retries=0,
    )
    assert isinstance(city, City)
