"""What the document cannot say: the name of the model that is served here, and how many tokens it knows.

Nine bodies of ten name it and its tokens; the others keep what was made up, and are refused. What the document forbids (a number
below 0 or of more than 32 bits) is left as it is.
"""

import zlib

import schemathesis

MODEL, VOCABULARY = "m", 512


def known(value):
    if isinstance(value, list):
        return [known(item) for item in value]
    is_token = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32
    return value % VOCABULARY if is_token else value


@schemathesis.hook
def map_body(context, body):
    if not isinstance(body, dict) or zlib.crc32(repr(body).encode()) % 10 == 0:
        return body
    if isinstance(body.get("model"), str):
        body["model"] = MODEL
    for field in ("prompt", "tokens", "allowed_token_ids", "stop_token_ids", "logprob_token_ids", "prompt_logprob_token_ids"):
        if isinstance(body.get(field), list):
            body[field] = known(body[field])
    return body
