"""Fine-tuning on chats: what is learned from, what a run leaves, how it goes on after a stop, and what it says of bad input.

Everything runs on a tiny mixture with latent attention; a run that was stopped must end in the very bytes of one that never was.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jevons.data.chat import Message
from jevons.data.shard import Shards, write_shards
from jevons.data.text import BadLines, Document, read_documents
from jevons.data.tokenizer import Tokenizer, train_bpe
from jevons.model.attend import Packed
from jevons.model.folder import companions, load_model, save_model
from jevons.recipe import load, parse
from jevons.run import Interrupt, Interrupted, Run
from jevons.stages import sft as stage
from jevons.train import device, lora
from jevons.train.conversation import Conversations, validation_loss
from jevons.train.loss import answer_token, next_token
from jevons.train.trainer import Trainer

SIZE = 320
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}
SFT = {"sequence_length": 64, "batch_size": 8, "micro_batch_tokens": 128, "epochs": 1.5, "lr": 1e-2, "processes": 1, "samples": 0}
SFT |= {"validation_share": 0.1, "evaluate_every": 4, "save_every": 3}


def chats(count=60, seed=0):
    draw = random.Random(seed)
    for _ in range(count):
        a, b = draw.choice("abcdefgh") * 3, draw.choice("uvwxyz") * 2
        question, answer = {"role": "user", "content": f"say {a} {b}"}, {"role": "assistant", "content": f"{a} and {b}"}
        yield {"messages": [question, answer] * draw.randint(1, 2)}


def write(path: Path, records) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records), "utf-8")
    return str(path)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(device, "measure_peak", lambda where, dtype: 1e11)
    monkeypatch.setattr(stage, "REPLY", 8)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe((m["content"] for chat in chats() for m in chat["messages"]), SIZE)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_model, tokenizer):
    """A model's folder with a tokenizer, and chats.jsonl beside it; not to be changed."""
    root = tmp_path_factory.mktemp("base")
    model = tiny_model("deepseek_v3", vocab_size=SIZE, num_nextn_predict_layers=1)
    model.init_weights(torch.Generator().manual_seed(0))
    tokenizer.save(root / "tokenizer")
    save_model(model, root / "model", companions=companions(root / "tokenizer"))
    write(root / "chats.jsonl", chats())
    return root


@pytest.fixture
def run_(base, tmp_path):
    """`run_(name, interrupt=None, **sft)`: run the stage; the run's folder."""

    def call(name="run", interrupt=None, model=None, **changes):
        values = {"sources": [str(base / "chats.jsonl")]} | SFT | changes
        given = {"name": name, "seed": 3, "device": "cpu", "dtype": "float32", "model": {"path": str(model or base / "model")}}
        recipe = parse(given | {"sft": {key: value for key, value in values.items() if value is not None}}, "test")
        run = Run(recipe, tmp_path / "runs", "cpu")
        try:
            stage.sft(run, recipe, interrupt or Interrupt())
        finally:
            run.ledger.close()
        return run.folder

    return call


@pytest.fixture
def conversations(tokenizer, tmp_path):
    """`conversations(documents, length=64, too_long="cut")`."""
    tokenizer.save(tmp_path / "tokenizer")

    def make(documents, length=64, too_long="cut"):
        write_shards(documents, tmp_path / "tokenizer", tmp_path / "shards", mask="assistant", source={})
        return Conversations.fit(Shards.open(tmp_path / "shards"), length, too_long)

    return make


def document(*turns, tools=(), line=1):
    """Turns by user and assistant in turn; a pair is reasoning and content."""
    speakers = itertools.cycle(("user", "assistant"))
    messages = tuple(Message(r, t) if isinstance(t, str) else Message(r, t[1], t[0]) for r, t in zip(speakers, turns))
    return Document(None, messages, "m", line, tools)


def rows(folder: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in lines if name in row}


# --- what is learned from ---


def test_only_the_assistant_is_learned_from(conversations, tokenizer, tiny_model):
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    turns = [Message("user", "say a"), Message("assistant", "", "hm", (call,)), Message("tool", "2"), Message("assistant", "so 2")]
    found = conversations([Document(None, tuple(turns), "m", 1, (TOOL,)), document("say b", "b it is", "and c", ("c?", "c"))], length=512)
    written = []
    for i in range(2):
        tokens, mask = found.document(i)
        pieces = [list(group) for kind, group in itertools.groupby(zip(tokens.tolist(), mask), key=lambda pair: pair[1]) if kind]
        written += [tokenizer.decode([token for token, _ in piece]) for piece in pieces]
    assert written == [
        '<think>hm</think><tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>',
        *("so 2<|im_end|>", "b it is<|im_end|>", "<think>c?</think>c<|im_end|>"),
    ]
    assert '"name": "add", "parameters"' in tokenizer.decode(found.document(0)[0].tolist())
    assert tokenizer.decode(found.prompt(1)) == "<|im_start|>user\nsay b<|im_end|>\n<|im_start|>assistant\n"

    model = tiny_model("qwen2", vocab_size=SIZE)
    nll = []  # one conversation at a time, the whole matrix of logits
    for i in range(2):
        tokens_T, mask_T = map(torch.from_numpy, found.document(i))
        attend = Packed(torch.tensor([0, len(tokens_T)], dtype=torch.int32))
        logits_TW = model.logits(model(tokens_T, torch.arange(len(tokens_T)), attend).hidden_TD)
        loss_T = torch.nn.functional.cross_entropy(logits_TW[:-1], tokens_T[1:], reduction="none")
        nll += loss_T[mask_T[1:] > 0].tolist()
    expected = pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert Trainer(model).forward_backward(list(found.batches([0, 1], 4096)), answer_token).loss == expected
    assert validation_loss(model, found, 4096) == expected


def test_the_head_sees_only_what_counts(conversations, tiny_model, assert_close):
    found = conversations(document(*(m["content"] for m in chat["messages"])) for chat in chats(6))
    gradients = []
    for loss, most in ((next_token, 4096), (answer_token, 4096), (answer_token, 64)):
        trainer = Trainer(tiny_model("deepseek_v3", vocab_size=SIZE))
        batches = list(found.batches(range(len(found)), most))
        assert len(batches) == 1 or all(b.num_tokens <= most for b in batches)
        trainer.forward_backward(batches, loss)
        gradients.append(torch.cat([g.flatten() for g in trainer.optimizer.gradients]))
    assert_close(gradients[1], gradients[0])
    assert_close(gradients[2], gradients[0])


def test_long_and_silent_conversations(conversations):
    documents = [
        document("say a", "a and b"),
        document("say a", "a" * 90),
        document("b" * 90, "a"),
        document("who?"),
    ]
    cut, dropped = conversations(documents), conversations(documents, too_long="drop")
    assert (len(cut), cut.cut, cut.too_long, cut.unlearnable) == (2, 1, 0, 2)
    assert (len(dropped), dropped.cut, dropped.too_long, dropped.unlearnable) == (1, 0, 2, 1)
    assert [len(cut.document(i)[0]) for i in range(2)] == [len(dropped.document(0)[0]), 64]
    assert cut.num_tokens == 64 + dropped.num_tokens and 0 < dropped.assistant_tokens < cut.assistant_tokens < 64


def test_held_out_and_order(conversations):
    words = [f"{a}{b}" for a in "abcdefgh" for b in "uvwxyz"]
    found = conversations([document(f"say {w}", w) for w in words + words])  # each twice
    train, held_out = found.split(12, seed=1)
    assert len(held_out) == 12 and len(train) == 84

    def texts(some):
        return {some.document(i)[0].tobytes() for i in range(len(some))}

    assert not texts(train) & texts(held_out)
    assert texts(found.split(12, seed=1)[1]) == texts(held_out) != texts(found.split(12, seed=2)[1])
    first, second = train.chosen(0, 84, seed=0), train.chosen(84, 84, seed=0)
    assert sorted(first) == sorted(second) == list(range(84)) and first != second
    assert train.chosen(80, 8, seed=0) == first[80:] + second[:4] and train.chosen(0, 84, seed=1) != first


def test_sharegpt_and_tools_are_read(tmp_path):
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
    plain = [{"role": "user", "content": "h"}, {"role": "assistant", "content": "g", "reasoning_content": "r"}]
    path = write(
        tmp_path / "a.jsonl",
        [
            {"id": 1, "conversations": turns},
            {"messages": plain, "tools": [TOOL]},
            {"messages": plain, "tools": json.dumps([TOOL])},
            {"messages": plain, "tools": None},
            {"messages": plain, "tools": {"name": "add"}},
            {"messages": plain, "tools": "["},
            {"conversations": [{"from": "human"}, {"value": "x"}]},
        ],
    )
    bad = BadLines()
    found = list(read_documents([path], bad=bad))
    assert found[0].messages == (Message("system", "s"), Message("user", "h"), Message("assistant", "g"))
    assert [d.tools for d in found] == [(), (TOOL,), (TOOL,), ()]
    assert all(d.messages == (Message("user", "h"), Message("assistant", "g", "r")) for d in found[1:])
    shown = [example.removeprefix(path) for example in bad.examples]
    assert shown[0] == ":5: tools: must be a list of objects, or such a list as JSON"
    assert shown[1].startswith(":6: tools: Expecting value") and shown[2].startswith(":7: conversations[1]: role: must be")


def test_what_a_template_would_drop_is_refused(base, run_, tmp_path):
    model = shutil.copytree(base / "model", tmp_path / "model")
    silent = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    silent += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (model / "chat_template.jinja").write_text(silent)
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    for record, reason in (
        ({"messages": [question, answer], "tools": [TOOL]}, "the chat template does not write tools"),
        ({"messages": [question, answer | {"reasoning": "because"}]}, "the chat template leaves out reasoning; use one that writes it"),
    ):
        source = write(tmp_path / "chats.jsonl", [record])
        with pytest.raises(ValueError, match=reason):
            run_(model=model, sources=[source], bad_lines=0)


# --- a run ---


KINDS = {
    "full": {"weight_decay": 0.1, "mtp_weight": 0.1, "bias_speed": 1e-3},
    "lora": {"lora": {"rank": 4}, "patience": 2, "evaluate_every": 1, "lr": 0.02, "schedule": "constant", "balance_weight": 1e-3},
}


def distance(model, held_out, most_tokens):
    """In the place of a validation loss: falls for a few steps at the rate 0.02, then rises."""
    return abs(model.model.layers[0].self_attn.o_proj.lora_B.abs().mean().item() - 0.05)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "full" else ()) for kind in KINDS])
def test_a_run_and_one_that_was_stopped(run_, base, kind, monkeypatch):
    """Stopped politely after the first step and before the last; and by force between two checkpoints."""
    if kind == "lora":
        monkeypatch.setattr(stage, "validation_loss", distance)
    whole = run_(kind, **KINDS[kind])
    done = json.loads((whole / "sft/DONE.json").read_text())
    steps = done["steps"]
    assert {p.name for p in (whole / "sft").iterdir()} == {"DONE.json", "model"} | ({"adapter"} if "lora" in KINDS[kind] else set())
    assert steps == 11 if kind == "full" else 2 < done["best_step"] == steps - 2 < 9  # 54 chats to learn from, 1.5 times, 8 a step

    take = stage.train_step

    def attempt(name, before):
        """Run on; `before(step, interrupt)` is called before every step."""
        interrupt = Interrupt()

        def step_(trainer, chats, options, seed, step, lr):
            before(step, interrupt)
            return take(trainer, chats, options, seed, step, lr)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "train_step", step_)
            return run_(name, interrupt, **KINDS[kind])

    for stop in (1, steps - 1):

        def asks(step, interrupt, stop=stop):
            if step + 1 == stop:
                interrupt.signal = 15

        with pytest.raises(Interrupted, match=f"saved after step {stop} of 11"):
            attempt("stopped", asks)
    stopped = run_("stopped", **KINDS[kind])

    def dies(step, interrupt):
        if step == min(5, steps - 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt("killed", dies)
    killed = run_("killed", **KINDS[kind])

    for other in (stopped, killed):
        files = sorted(p.relative_to(whole) for p in (whole / "sft").rglob("*") if p.is_file())
        assert files == sorted(p.relative_to(other) for p in (other / "sft").rglob("*") if p.is_file())
        assert all((whole / file).read_bytes() == (other / file).read_bytes() for file in files)
        for name in ("loss", "validation_loss", "grad_norm", "lr", "tokens", "epoch", "mtp_loss"):
            assert rows(other, name) == rows(whole, name), name
        assert len((other / "metrics.jsonl").read_text().splitlines()) == len((whole / "metrics.jsonl").read_text().splitlines())


def test_what_a_run_says(run_, base, capfd):
    folder = run_(samples=2, lora={"rank": 4, "targets": ["attention", "mlp"]})
    losses, tokens, seen = rows(folder, "validation_loss"), rows(folder, "tokens"), rows(folder, "epoch")
    assert list(losses) == [0, 4, 8, 11] and losses[11] < 0.97 * losses[0]
    assert list(tokens) == list(range(1, 12)) and seen[11] == 1.5
    samples = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"sample"' in line]
    assert [row["step"] for row in samples] == [0, 0, 11, 11]
    assert all(row["sample"]["prompt"].startswith("user\nsay ") for row in samples)
    (receipt,) = json.loads((folder / "receipt.json").read_text())["stages"]
    assert receipt["tokens"] == tokens[11] and receipt["planned"]["tokens"] == pytest.approx(tokens[11], rel=0.1)
    assert receipt["flops"] == pytest.approx(receipt["planned"]["flops"], rel=0.1)
    said = capfd.readouterr().out
    assert "54 conversations and 6 held out" in said and "sft 11/11" in said


def test_adapters_are_merged(run_, base, assert_close):
    folder = run_(lora={"rank": 4, "rslora": True})
    fields = json.loads((folder / "sft/adapter/adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(base / "model")
    before, after = (load_file(path / "model.safetensors") for path in (base / "model", folder / "sft/model"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    with_adapter = load_model(base / "model", dtype=torch.float32)
    lora.load_adapter(with_adapter, folder / "sft/adapter")
    merged = load_model(folder / "sft/model", dtype=torch.float32)
    tokens_T = torch.arange(30) * 5 % SIZE
    attend = Packed(torch.tensor([0, 30], dtype=torch.int32))
    hidden = [m(tokens_T, torch.arange(30), attend).hidden_TD for m in (merged, with_adapter)]
    assert_close(hidden[0], hidden[1], 3e-5)  # W + BA at once, or W and BA apart: some roundings a layer, which differ by processor


def test_full_training_leaves_what_no_loss_reaches(run_, base):
    folder = run_(weight_decay=0.5)
    before, after = (load_file(path / "model.safetensors") for path in (base / "model", folder / "sft/model"))
    kept = {name for name in before if torch.equal(before[name], after[name])}
    own = {name for name in before if ".layers.3." in name and not name.endswith(("embed_tokens.weight", "head.weight"))}
    biases = {name for name in before if name.endswith("e_score_correction_bias")}
    assert own and kept == own | biases  # the prediction module's and the routers', nothing else


def test_patience_keeps_the_best(run_, base):
    """At a rate that only does harm the best model is the one it began with."""
    folder = run_(lr=3.0, clip=0.0, schedule="constant", warmup_share=0.0, patience=2, epochs=20, evaluate_every=1, batch_size=16)
    done = json.loads((folder / "sft/DONE.json").read_text())
    losses = rows(folder, "validation_loss")
    assert done["best_step"] == 0 and done["steps"] == 2 and done["validation_loss"] == losses[0] == min(losses.values())
    before, after = (load_file(path / "model.safetensors") for path in (base / "model", folder / "sft/model"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tasks_and_an_earlier_stage(base, tmp_path):
    """From a model that the run itself trained, on worked solutions; held out are problems of the test split."""
    task = {"task": "arithmetic", "options": {"digits": 1, "operations": "+"}}
    sizes = {"vocab_size": SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {"name": "chain", "device": "cpu", "dtype": "float32", "model": {"model_type": "qwen2", **sizes}}
    values |= {
        "prepare": {"tasks": [task], "documents": 10},
        "pretrain": {"steps": 1, "sequence_length": 16, "batch_size": 1, "lr": 1e-3},
        "sft": {"tasks": [task], "documents": 40, "sequence_length": 96, "lora": {"rank": 2}, "processes": 1, "samples": 1},
    }
    run = Run(recipe := parse(values, "test"), tmp_path / "runs", "cpu")
    shutil.copytree(base / "model", run.stage_folder("pretrain") / "model")
    stage.sft(run, recipe, Interrupt())
    run.ledger.close()
    fields = json.loads((run.folder / "sft/adapter/adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(run.folder / "pretrain/model")
    assert list(rows(run.folder, "validation_loss")) == [0, 3] and len(rows(run.folder, "loss")) == 3


def test_an_epoch_shows_each_chat_once(run_, monkeypatch):
    """The last step takes what is left, and what no step divides is validated all the same once an epoch."""
    taken = []
    chosen = Conversations.chosen
    monkeypatch.setattr(Conversations, "chosen", lambda self, *args: taken.append(chosen(self, *args)) or taken[-1])
    folder = run_(epochs=2, batch_size=20, evaluate_every=0)
    assert [len(step) for step in taken] == [20, 20, 20, 20, 20, 8]  # of 54, twice
    order = [index for step in taken for index in step]
    assert sorted(order[:54]) == sorted(order[54:]) == list(range(54))
    assert list(rows(folder, "validation_loss")) == [0, 3, 6] and rows(folder, "epoch")[6] == 2
    taken.clear()
    folder = run_("few", epochs=3, batch_size=100, evaluate_every=0)  # more than there are: a step holds some twice
    assert [len(step) for step in taken] == [100, 62] and list(rows(folder, "validation_loss")) == [0, 1, 2]


def test_without_validation(run_):
    folder = run_(validation_share=0, epochs=0.2)
    assert not rows(folder, "validation_loss") and len(rows(folder, "loss")) == 2
    assert json.loads((folder / "sft/DONE.json").read_text())["validation_loss"] is None


# --- bad input ---


def test_bad_models_and_chats(base, run_, tmp_path):
    def refuses(message, **changes):
        with pytest.raises(ValueError, match=message):
            run_(**changes)

    user, assistant = {"role": "user", "content": "q " * 99}, {"role": "assistant", "content": "a"}
    long = write(tmp_path / "long.jsonl", [{"messages": [user, assistant]}] * 2)
    mute = write(tmp_path / "mute.jsonl", [{"messages": [{"role": "user", "content": "q"}]}])
    refuses("nothing to learn from 2 conversations: 0 are longer than sft.sequence_length 64, 2 have no assistant", sources=[long])
    refuses("nothing to learn from 2 conversations: 2 are longer", sources=[long], too_long="drop")
    refuses("nothing to learn from 1 conversations", sources=[mute])
    refuses("plain text has no assistant", sources=[write(tmp_path / "plain.jsonl", [{"text": "t"}])])
    refuses("a single conversation cannot be", sources=[write(tmp_path / "one.jsonl", itertools.islice(chats(), 1))])
    refuses("sft.sequence_length: 500 is more than the model's 128 positions", sequence_length=500, micro_batch_tokens=500)
    refuses("this model has no|lora.targets", lora={"rank": 2, "targets": []})

    model = shutil.copytree(base / "model", tmp_path / "model")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    refuses("the chat template has no generation prompt", model=model)
    (model / "chat_template.jinja").unlink()
    refuses("the tokenizer has no chat template", model=model)
    train_bpe(["x"], 700, special_tokens=[*(f"<{i}>" for i in range(99)), "<|endoftext|>", "<|im_end|>"]).save(model)
    refuses(r"the tokenizer has \d+ tokens, the model's embedding 320", model=model)


def test_a_loss_that_is_not_finite_names_the_conversations(run_):
    with pytest.raises(FloatingPointError, match=r"sft step \d+, conversations \d+, .*lower sft.lr and start over with --from sft"):
        run_(lr=1e30, clip=0.0, epochs=5, warmup_share=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patience": 2, "validation_share": 0}, "sft.patience: without validation_share"),
        ({"lora": {}, "bias_speed": 0.001}, "sft.bias_speed: an adapter cannot hold router biases"),
        ({"micro_batch_tokens": 32}, "sft.micro_batch_tokens: 32 is less than sequence_length 64"),
        ({"minimum_lr": 1.0}, "sft.minimum_lr: 1.0 is more than lr"),
        ({"sources": None}, "sft.sources: give either these or tasks"),
        ({"lora": {"targets": ["router"]}}, r"sft.lora.targets.0"),
    ],
)
def test_bad_recipes(run_, changes, message):
    with pytest.raises(ValueError, match=message):
        run_(**changes)


# --- real ---


@pytest.mark.slow
def test_real_conversations(tmp_path):
    """The real model on real conversations: a few steps of LoRA lower the loss on those held out."""
    model, text = os.environ.get("JEVONS_REAL_MODEL"), os.environ.get("JEVONS_REAL_TEXT")
    if not model or not text:
        pytest.skip("JEVONS_REAL_MODEL and JEVONS_REAL_TEXT name no model and no conversations")
    changes = [f"model.path={model}", f"sft.sources=['{text}']", "sft.documents=100", "sft.sequence_length=160", "sft.epochs=0.7"]
    changes += ["sft.micro_batch_tokens=1024", "sft.evaluate_every=4", "sft.validation_share=0.2", "sft.samples=0", "sft.lr=2e-4"]
    recipe = load("sft", [*changes, "device='cpu'"]).settle(device.best_dtype(torch.device("cpu")))
    run = Run(recipe, tmp_path, "cpu")
    stage.sft(run, recipe, Interrupt())
    run.ledger.close()
    losses = rows(run.folder, "validation_loss")
    assert min(losses.values()) < losses[0] - 0.005, losses
    tokenizer = Tokenizer.load(run.folder / "sft/model")
    assert np.isfinite(list(losses.values())).all() and tokenizer.template is not None
