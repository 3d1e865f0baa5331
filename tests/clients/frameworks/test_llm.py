"""The command line tool `llm`, told of a server by `extra-openai-models.yaml`."""

import json
import os
import subprocess
import sys

import pytest

BASE, MODEL = os.environ["BASE_URL"] + "/v1", os.environ["MODEL"]


@pytest.fixture
def llm(tmp_path):
    model = {"model_id": "served", "model_name": MODEL, "api_base": BASE, "supports_schema": True, "supports_tools": True}
    # JSON is YAML.
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model | {"can_stream": True}]))

    def run(*arguments):
        command = [sys.executable, "-m", "llm", "-m", "served", "-o", "temperature", "0", "-o", "max_tokens", "60"]
        done = subprocess.run(
            [*command, *arguments],
            env=os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "EMPTY"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_prompt_whole_and_streamed_says_the_same(llm):
    whole = llm("--no-stream", "Say hello.")
    assert whole.strip() and llm("Say hello.") == whole


def test_a_schema_is_met(llm):
    answer = json.loads(llm("--schema", "name, age int", "Invent a dog."))
    assert set(answer) == {"name", "age"} and isinstance(answer["age"], int)
