"""lm-eval through the server says what lm-eval says of the same folder with its own hf backend.

`local-completions` scores and generates by token ids, with the tokenizer asked from the server, so nothing but the address is given;
`local-chat-completions` generates from messages. The model is tiny and random, the tasks are files written here.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from scripted import make_service, served

from jevons.data.tokenizer import train_bpe
from jevons.engine.engine import Engine
from jevons.engine.sequence import SamplingParams
from jevons.model.attend import Packed
from jevons.model.config import ModelConfig
from jevons.model.folder import save_model
from jevons.model.transformer import Transformer

CONTEXTS = [
    "The quick brown fox",
    "Speak, friend, and",
    "A lazy dog jumps over the",
    "Numbers: 1, 2, 3,",
    "Who let the",
    "All that is gold does not",
    "In a hole in the ground there",
    "It was the best of",
]
ENDINGS = [" glitter", " enter", " lived", " times and", " fox. The dog", " 4, 5", " dogs out?", " lazy"]
TASKS = {
    "tiny_likelihood": {"output_type": "loglikelihood", "doc_to_text": "{{context}}", "doc_to_target": "{{ending}}"},
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_text": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{ending}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0.0, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
TASKS["tiny_likelihood"] |= {"target_delimiter": "", "metric_list": [{"metric": "acc"}]}


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model's folder, its server, and the tasks' folder."""
    folder = tmp_path_factory.mktemp("eval")
    tokenizer = train_bpe([" ".join(CONTEXTS + ENDINGS)] * 4, 420)
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": tokenizer.size, "eos_token_id": tokenizer.eos_id}
    model = Transformer(ModelConfig(**fields, model_type="qwen2"))
    model.init_weights(torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    save_model(model, folder / "model")
    tokenizer.save(folder / "model")
    engine = Engine(model, num_blocks=256, max_sequences=8, use_native=False)
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in documents(engine, tokenizer)))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))  # JSON is YAML
    service, _ = make_service(engine, tokenizer, folder / "ledger.db")
    with served(service, page=False) as url:
        yield SimpleNamespace(folder=folder, url=url)


def documents(engine, tokenizer):
    """Contexts with four endings, of which `gold` is the model's own favourite, and for some the very tokens that it would say."""
    for i, context in enumerate(CONTEXTS):
        ids = tokenizer.encode(context)
        (said,) = engine.generate([ids], SamplingParams(max_tokens=2, temperature=0))
        choices = [ENDINGS[(i + j) % len(ENDINGS)] for j in range(4)]
        favourite = tokenizer.decode(said.tokens)
        if tokenizer.encode(context + favourite) == ids + said.tokens:  # text that is read as the tokens that were said
            choices[i % 4] = favourite
        scores = [score(engine.model, ids, tokenizer.encode(context + choice)) for choice in choices]
        yield {"context": context, "ending": choices[i % 4], "choices": choices, "gold": scores.index(max(scores))}


def score(model, context, whole):
    """The log-probability of what follows the context, by one plain forward."""
    tokens = torch.tensor(whole)
    logps = model.logits(model(tokens, torch.arange(len(whole)), Packed(torch.tensor([0, len(whole)]))).hidden_TD).log_softmax(-1)
    return sum(logps[i - 1, whole[i]].item() for i in range(len(context), len(whole)))


def evaluate(world, model, model_args, tasks, **options):
    """lm-eval's results, and what the model answered to each request in order."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(world.folder), include_defaults=False)
    out = lm_eval.simple_evaluate(
        model=model, model_args=model_args, tasks=tasks, task_manager=manager, bootstrap_iters=0, verbosity="ERROR", **options
    )
    answers = {}
    for task in tasks:
        samples = sorted(out["samples"][task], key=lambda sample: sample["doc_id"])
        answers[task] = [answer for sample in samples for answers in sample["resps"] for answer in answers]
    return out["results"], answers


@pytest.fixture(scope="module")
def theirs(world):
    arguments = {"pretrained": str(world.folder / "model"), "dtype": "float32", "device": "cpu", "batch_size": 1}
    return evaluate(world, "hf", arguments, list(TASKS))


@pytest.mark.parametrize("batch", [1, 5])
def test_completions(world, theirs, batch):
    # no tokenizer is named: lm-eval finds /tokenizer_info, /tokenize and /detokenize
    arguments = {"model": "tiny", "base_url": f"{world.url}/v1/completions", "batch_size": batch, "num_concurrent": 1, "max_retries": 1}
    results, answers = evaluate(world, "local-completions", arguments, list(TASKS))
    for task in ("tiny_likelihood", "tiny_choice"):
        ours, reference = answers[task], theirs[1][task]
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in reference]
        torch.testing.assert_close(torch.tensor([x for x, _ in ours]), torch.tensor([x for x, _ in reference]), atol=1e-3, rtol=0)
    greedy = [greedy for _, greedy in answers["tiny_likelihood"]]
    assert True in greedy and False in greedy
    assert answers["tiny_text"] == theirs[1]["tiny_text"] and len(set(answers["tiny_text"])) > 1
    # a server that ignores echo, or scores other positions, answers at the level of chance, a quarter
    assert results["tiny_choice"]["acc,none"] == theirs[0]["tiny_choice"]["acc,none"] == 1.0


def test_chat(world):
    arguments = {"pretrained": str(world.folder / "model"), "dtype": "float32", "device": "cpu", "batch_size": 1}
    _, reference = evaluate(world, "hf", arguments, ["tiny_text"], apply_chat_template=True)
    arguments = {"model": "tiny", "base_url": f"{world.url}/v1/chat/completions", "num_concurrent": 2, "max_retries": 1}
    _, ours = evaluate(world, "local-chat-completions", arguments, ["tiny_text"], apply_chat_template=True)
    assert ours == reference
