"""Real weights and real text: a Qwen2.5 checkpoint in JEVONS_REAL_MODEL, conversations as JSON lines in JEVONS_REAL_TEXT."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jevons.data.chat import Message
from jevons.data.tokenizer import Tokenizer
from jevons.engine.engine import Engine
from jevons.engine.packed import pack_model
from jevons.engine.sequence import SamplingParams
from jevons.kernels import native
from jevons.model.folder import load_model
from jevons.stages.dialogue import prompt_ids
from jevons.train import device

pytestmark = pytest.mark.slow

PROMPTS = [
    "Write a Python function is_prime(n). Only the code.",
    "Explain what a hash table is.",
    "What is the capital of France, and what is it known for?",
    "Write a SQL query that counts users by country.",
    "Translate to German: The weather is nice today.",
    "List five sorting algorithms with their complexity.",
    "Write a haiku about the sea.",
    "Fix this: for i in range(10) print(i)",
    "How do I read a JSON file in Rust?",
    "Solve 3x + 5 = 20 step by step.",
]


def needs(variable: str) -> Path:
    path = os.environ.get(variable)
    if not path:
        pytest.skip(f"{variable} is not set")
    return Path(path)


@pytest.fixture(scope="module")
def folder() -> Path:
    return needs("JEVONS_REAL_MODEL")


def test_greedy_tokens_are_those_of_transformers(folder):
    """200 tokens of ten prompts in fp32, all decoded in one batch; each the argmax of transformers' forward on what precedes."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, dtype=torch.float32)
    prompts = [prompt_ids(tokenizer, [Message("user", p)]) for p in PROMPTS]
    samples = Engine(model, stop_ids=()).generate(prompts, SamplingParams(max_tokens=200, temperature=0))
    del model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, sample in zip(prompts, samples):
        assert len(sample.tokens) == 200
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + sample.tokens]), logits_to_keep=201).logits[0, :-1]
        assert logits.argmax(-1).tolist() == sample.tokens
    with torch.inference_mode():
        out = theirs.generate(torch.tensor([prompts[0]]), max_new_tokens=64, do_sample=False, eos_token_id=None, repetition_penalty=1.0)
    assert out[0, len(prompts[0]) :].tolist() == samples[0].tokens[:64]


def test_fewer_bits_cost_little_on_real_text(folder):
    """Nats a token of real conversations under each weight format, beside the plain modules in what this processor multiplies."""
    if not native.available():
        pytest.skip(native.reason())
    tokenizer, text = Tokenizer.load(folder), needs("JEVONS_REAL_TEXT")
    with text.open(encoding="utf-8") as source:
        rows = [json.loads(line)["messages"] for line, _ in zip(source, range(5))]
    prompts = [tokenizer.encode("\n\n".join(message["content"] for message in row))[:200] for row in rows]
    nats = {}
    for format in ("plain", "bf16", "int8", "int4"):
        dtype = device.best_dtype(torch.device("cpu")) if format == "plain" else "bfloat16"
        model = load_model(folder, dtype=getattr(torch, dtype))
        if format != "plain":
            pack_model(model, format)
        scored = Engine(model).generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0))
        logps = [p for sample in scored for p, _ in sample.prompt_logprobs]
        nats[format] = -sum(logps) / len(logps)
    print(nats)
    assert abs(nats["bf16"] / nats["plain"] - 1) < 0.002
    assert abs(nats["int8"] / nats["plain"] - 1) < 0.01
    assert nats["int4"] / nats["plain"] - 1 < 0.05


def test_it_writes_working_python(folder):
    question = "Write a Python function is_prime(n) that returns True if n is prime. Reply with one code block and no examples."
    done = subprocess.run(
        [sys.executable, "-m", "jevons.cli", "chat", str(folder), "-p", question, "--max-tokens", "300"],
        capture_output=True,
        text=True,
        check=True,
    )
    code = re.search(r"```python\n(.*?)```", done.stdout, re.DOTALL)
    assert code, done.stdout
    check = code[1] + "\nprint([n for n in range(30) if is_prime(n)])"
    run = subprocess.run([sys.executable, "-I", "-c", check], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip().endswith("[2, 3, 5, 7, 11, 13, 17, 19, 23, 29]"), run.stderr


def test_loading_reads_no_weight_and_holds_little_more_than_the_checkpoint(folder):
    """A pass over the weights would bring their pages into memory, whatever the clock says: on a busy machine it says anything."""
    command = [sys.executable, str(Path(__file__).parent.parent / "benchmarks" / "load.py"), "--model", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ours = json.loads(done.stdout.splitlines()[-1])["ours"]
    assert ours["memory_loaded"] <= 0.15  # 0.07, most of which torch imports meanwhile
    assert ours["memory"] <= 1.2


def test_real_conversations_train(tmp_path):
    """A minute's worth of real text through the recipe that comes for it: bits per byte fall well below the start."""
    text = needs("JEVONS_REAL_TEXT")
    part = tmp_path / "part.jsonl"
    with text.open(encoding="utf-8") as source:
        part.write_text("".join(line for line, _ in zip(source, range(1500))), encoding="utf-8")
    overrides = [f'prepare.sources=["{part}"]', "name=real", "pretrain.steps=40", "pretrain.warmup_steps=5", "pretrain.schedule=cosine"]
    overrides += ["pretrain.decay_steps=0", "model.vocab_size=2048", "model.num_hidden_layers=3", "pretrain.evaluate_windows=8"]
    command = [sys.executable, "-m", "jevons.cli", "run", "text", *overrides, "--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs" / "real" / "metrics.jsonl").read_text().splitlines()]
    bits = [row["bits_per_byte"] for row in rows if "bits_per_byte" in row]
    assert bits[-1] < 0.9 * bits[0]  # 4.25 to 3.53 in these 40 steps
