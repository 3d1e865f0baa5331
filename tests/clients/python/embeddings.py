"""Embeddings, as the `openai` package asks for them: in base64 where nothing is said, and as numbers."""

import openai
from server import ASYNC, CLIENT, MODEL, refused


def check_embeddings_come_in_both_encodings():
    # The client asks for base64 by itself, and gives numbers.
    [one] = CLIENT.embeddings.create(model=MODEL, input="A cat sat on the mat.").data
    [same] = CLIENT.embeddings.create(model=MODEL, input="A cat sat on the mat.", encoding_format="float").data
    assert one.object == "embedding" and one.index == 0 and len(one.embedding) == len(same.embedding) > 1
    assert all(abs(a - b) < 1e-6 for a, b in zip(one.embedding, same.embedding))
    assert abs(sum(value * value for value in one.embedding) - 1) < 1e-3
    raw = CLIENT.embeddings.create(model=MODEL, input="A cat", encoding_format="base64").data[0].embedding
    assert isinstance(raw, str)


def check_embeddings_of_lists_come_in_order():
    texts = ["A cat sat on the mat.", "Stocks fell on Monday.", "A cat sat on the mat."]
    answer = CLIENT.embeddings.create(model=MODEL, input=texts)
    assert answer.object == "list" and [item.index for item in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    first, second, third = (item.embedding for item in answer.data)
    assert all(abs(a - b) < 1e-5 for a, b in zip(first, third)) and first != second
    ids = CLIENT.embeddings.create(model=MODEL, input=[[1, 2, 3], [4, 5]])
    assert len(ids.data) == 2 and ids.usage.prompt_tokens == 5


def check_embeddings_refuse_by_name():
    refused(openai.NotFoundError, 404, lambda: CLIENT.embeddings.create(model="none", input="x"))
    assert refused(openai.BadRequestError, 400, lambda: CLIENT.embeddings.create(model=MODEL, input=[])).param == "input"


async def check_embeddings_without_waiting():
    answer = await ASYNC.embeddings.create(model=MODEL, input=["a", "b"])
    assert len(answer.data) == 2
