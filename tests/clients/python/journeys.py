"""Programs of the first users, unchanged but for the address."""

import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlencode, urlparse
from urllib.request import urlopen

from openai import OpenAI
from server import BASE, MODEL, PATH

WORLD_CUP = [
    {"role": "system", "content": "你是一个很有帮助的AI助手"},
    {"role": "user", "content": "2018年世界杯冠军是哪个国家?"},
    {"role": "assistant", "content": "法国队获得了2018年世界杯冠军。"},
    {"role": "user", "content": "决赛是在哪里举行的?"},
]


def check_journey_4_a_conversation_with_the_models_path():
    client = OpenAI(api_key="EMPTY", base_url=f"{BASE}/v1")
    models = client.models.list()
    assert MODEL in [model.id for model in models.data], models
    chat_response = client.chat.completions.create(model=PATH, messages=WORLD_CUP, max_tokens=128)
    message = chat_response.choices[0].message
    assert message.role == "assistant" and isinstance(message.content, str) and message.content
    assert chat_response.usage.completion_tokens <= 128


def check_journey_4_with_curl():
    def curl(path, *arguments):
        key = ["-H", "Authorization: Bearer EMPTY"]
        done = subprocess.run(["curl", "-sS", "--fail", f"{BASE}{path}", *key, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done
        return json.loads(done.stdout)

    assert PATH.rstrip("/") in [model["root"].rstrip("/") for model in curl("/v1/models")["data"]]
    body = json.dumps({"model": PATH, "messages": WORLD_CUP, "max_tokens": 128}, ensure_ascii=False)
    answer = curl("/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body)
    assert answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"] <= 128


class Names(BaseHTTPRequestHandler):
    """The web service that the program of journey 5 asks."""

    def do_GET(self):
        asked = parse_qs(urlparse(self.path).query)
        body = json.dumps({"names": [asked["surname"][0] + "明轩"], "sex": asked["sex"][0]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "aiQiming",
            "description": "根据性别和姓氏给孩子起名字",
            "parameters": {
                "type": "object",
                "properties": {
                    "sex": {"type": "string", "description": "性别，男或女"},
                    "surname": {"type": "string", "description": "姓氏，例如：王"},
                },
                "required": ["sex", "surname"],
            },
        },
    }
]
QUESTION = [{"role": "user", "content": "帮我给一个姓王的男孩起个名字"}]


def called_with(call):
    """The arguments of a call, as the program reads them."""
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "aiQiming" and call.type == "function" and call.id, call
    assert set(arguments) == {"sex", "surname"} and all(isinstance(value, str) for value in arguments.values()), arguments
    return arguments


def check_journey_5_a_function_is_called_and_its_result_is_read():
    client = OpenAI(api_key="EMPTY", base_url=f"{BASE}/v1")
    service = HTTPServer(("127.0.0.1", 0), Names)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    named = {"type": "function", "function": {"name": "aiQiming"}}
    for choice in (named, "required"):
        messages = list(QUESTION)
        # Without a bound on the strings of its schema a model this small may not come to an end: a seed with which it does.
        response = client.chat.completions.create(
            model=PATH, messages=messages, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=200, seed=1
        )
        message = response.choices[0].message
        assert response.choices[0].finish_reason == ("stop" if choice is named else "tool_calls"), response
        arguments = called_with(message.tool_calls[0])
        with urlopen(f"http://127.0.0.1:{service.server_port}/?{urlencode(arguments)}") as answer:
            result = answer.read().decode()
        messages.append(message)
        messages.append({"role": "tool", "tool_call_id": message.tool_calls[0].id, "name": "aiQiming", "content": result})
        final = client.chat.completions.create(model=PATH, messages=messages, tools=TOOLS, max_tokens=32)
        assert final.usage.prompt_tokens > response.usage.prompt_tokens
        assert final.choices[0].message.content or final.choices[0].message.tool_calls
    service.shutdown()


def check_journey_5_with_every_choice_of_tools():
    client = OpenAI(api_key="EMPTY", base_url=f"{BASE}/v1")
    ask = dict(model=PATH, messages=QUESTION, tools=TOOLS, max_tokens=64, temperature=0)
    for choice in ({"tool_choice": "auto"}, {}):
        message = client.chat.completions.create(**ask, **choice).choices[0].message
        # Whether to call is up to the model; a call that it makes has a name.
        assert message.content or all(call.function.name for call in message.tool_calls), message
    without = client.chat.completions.create(**ask, tool_choice="none")
    assert without.choices[0].message.content and not without.choices[0].message.tool_calls
    assert without.usage.prompt_tokens < client.chat.completions.create(**ask).usage.prompt_tokens
