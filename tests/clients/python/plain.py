"""Text in, text out: chat, completions, responses, messages, errors."""

import asyncio

import anthropic
import openai
from server import ASYNC, CLAUDE, CLIENT, HI, MODEL, refused


def check_models_are_listed():
    models = CLIENT.models.list()
    assert MODEL in [model.id for model in models.data], models
    assert CLIENT.models.retrieve(MODEL).id == MODEL


def check_chat_whole_and_streamed_say_the_same():
    ask = dict(model=MODEL, messages=HI, temperature=0, max_tokens=12)
    whole = CLIENT.chat.completions.create(**ask)
    chunks = list(CLIENT.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content, (text, whole)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def check_the_streaming_helper_ends_with_a_completion():
    with CLIENT.chat.completions.stream(model=MODEL, messages=HI, temperature=0, max_tokens=300) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds and "content.done" in kinds, kinds
    assert final.choices[0].message.content and final.choices[0].finish_reason == "stop"


def check_completions_take_text_and_ids():
    text = CLIENT.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0, logprobs=2)
    assert text.object == "text_completion" and len(text.choices[0].logprobs.tokens) == 4
    several = CLIENT.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=2, n=2, temperature=1, seed=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    ids = CLIENT.completions.create(model=MODEL, prompt=[1, 2, 3], max_tokens=1, echo=True)
    assert ids.usage.prompt_tokens == 3


def check_logprobs_of_chat():
    answer = CLIENT.chat.completions.create(
        model=MODEL, messages=HI, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 3 and all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)


def check_responses_whole_and_streamed_say_the_same():
    ask = dict(model=MODEL, input="Say hello.", instructions="Be short.", temperature=0, max_output_tokens=12)
    whole = CLIENT.responses.create(**ask)
    assert whole.object == "response" and whole.status in ("completed", "incomplete") and whole.output_text
    events = list(CLIENT.responses.create(**ask, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type in ("response.completed", "response.incomplete")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens


def check_the_responses_helper_ends_with_a_response():
    with CLIENT.responses.stream(model=MODEL, input="Hi", max_output_tokens=300, temperature=0) as stream:
        last = None
        for event in stream:
            last = event
        final = stream.get_final_response()
    assert last.type == "response.completed" and final.output_text, last


def check_responses_go_on_from_items():
    first = CLIENT.responses.create(model=MODEL, input="Hi", max_output_tokens=5, temperature=0)
    items = [{"role": "user", "content": "Hi"}, *[item.model_dump() for item in first.output]]
    items.append({"role": "user", "content": [{"type": "input_text", "text": "Go on."}]})
    second = CLIENT.responses.create(model=MODEL, input=items, max_output_tokens=5)
    assert second.usage.input_tokens > first.usage.input_tokens


def check_anthropics_client_whole_and_streamed():
    ask = dict(model=MODEL, messages=HI, system="Be short.", max_tokens=12, extra_body={"temperature": 0})
    whole = CLAUDE.messages.create(**ask)
    assert whole.role == "assistant" and whole.stop_reason in ("end_turn", "max_tokens") and whole.content[0].text
    with CLAUDE.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens and final.stop_reason == whole.stop_reason
    stopped = CLAUDE.messages.create(**{**ask, "stop_sequences": [text[1:3]]})
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == text[1:3]
    assert CLAUDE.messages.count_tokens(model=MODEL, messages=HI).input_tokens > 0


def check_errors_have_the_types_of_the_clients():
    def ask(**more):
        return lambda: CLIENT.chat.completions.create(**{"model": MODEL, "messages": HI, **more})

    assert refused(openai.NotFoundError, 404, ask(model="none")).code == "model_not_found"
    assert refused(openai.BadRequestError, 400, ask(temperature=-1)).param == "temperature"
    long = refused(openai.BadRequestError, 400, ask(messages=[{"role": "user", "content": "word " * 20000}]))
    assert long.code == "context_length_exceeded", long
    refused(openai.BadRequestError, 400, lambda: CLIENT.responses.create(model=MODEL, input="x", background=True))
    late = ask(max_tokens=4000, extra_body={"ignore_eos": True}, extra_headers={"x-request-timeout": "300ms"})
    assert refused(openai.InternalServerError, 504, late).code == "deadline_exceeded"
    wrong = refused(anthropic.NotFoundError, 404, lambda: CLAUDE.messages.create(model="none", messages=HI, max_tokens=1))
    assert wrong.body["error"]["type"] == "not_found_error"


async def check_many_at_once():
    async def one(number):
        answer = await ASYNC.chat.completions.create(model=MODEL, messages=HI, max_tokens=4, seed=number)
        return answer.usage.completion_tokens

    assert all(0 < tokens <= 4 for tokens in await asyncio.gather(*[one(number) for number in range(8)]))


async def check_a_stream_that_is_left_is_no_harm():
    stream = await ASYNC.chat.completions.create(model=MODEL, messages=HI, max_tokens=2000, stream=True)
    async for _ in stream:
        break
    await stream.close()
    answer = await ASYNC.chat.completions.create(model=MODEL, messages=HI, max_tokens=1)
    assert answer.choices
