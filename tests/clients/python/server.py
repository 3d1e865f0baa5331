"""The server that runs, and the clients that every case shares. Usage of the suite: suite.py BASE_URL MODEL MODEL_PATH."""

import sys

import anthropic
from openai import AsyncOpenAI, OpenAI

BASE, MODEL, PATH = sys.argv[1], sys.argv[2], sys.argv[3]
CLIENT = OpenAI(base_url=f"{BASE}/v1", api_key="EMPTY", max_retries=0, timeout=120)
ASYNC = AsyncOpenAI(base_url=f"{BASE}/v1", api_key="EMPTY", max_retries=0, timeout=120)
CLAUDE = anthropic.Anthropic(base_url=BASE, api_key="EMPTY", max_retries=0, timeout=120)
HI = [{"role": "user", "content": "Say hello."}]


def refused(kind, status, call):
    try:
        call()
    except kind as error:
        assert error.status_code == status, error
        return error
    raise AssertionError(f"no {kind.__name__}")
