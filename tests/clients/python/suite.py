"""What Python programs do with the `openai` and `anthropic` packages, against a server that runs.

Usage: suite.py BASE_URL MODEL MODEL_PATH. Each function named check_* is one case; every failure is told.
"""

import asyncio
import inspect
import sys
import traceback

import embeddings
import journeys
import plain
import structured

MODULES = [plain, structured, journeys, embeddings]


async def main():
    failed = 0
    cases = [case for module in MODULES for case in vars(module).items() if case[0].startswith("check_")]
    for name, case in cases:
        try:
            result = case()
            if inspect.isawaitable(result):
                await result
            print(f"ok      {name}")
        except Exception:
            failed += 1
            print(f"FAILED  {name}\n{traceback.format_exc()}")
    print(f"{len(cases) - failed} of {len(cases)} cases passed")
    return failed


if __name__ == "__main__":
    sys.exit(1 if asyncio.run(main()) else 0)
