"""Recipes: whatever is mistyped is refused at the start, with the file, the key and what was meant; whatever is accepted is kept whole."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from jevons.model.config import ModelConfig
from jevons.recipe import TRAINING, Recipe, find, load, override, parse

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
TINY = tomllib.loads(
    """
name = "tiny"

[model]
model_type = "deepseek_v3"
vocab_size = 320
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
n_routed_experts = 4
num_experts_per_tok = 2
moe_intermediate_size = 16
first_k_dense_replace = 1
max_position_embeddings = 128

[prepare]
documents = 300
tasks = [{ task = "arithmetic", options = { digits = 2 } }]

[pretrain]
steps = 20
sequence_length = 64
batch_size = 4
lr = 1e-3

[evaluate]
problems = 4
"""
)
GONE = object()


def changed(changes):
    """TINY with dotted keys set or, by GONE, taken away; numbers index lists."""
    values = copy.deepcopy(TINY)
    for key, value in changes.items():
        *parents, leaf = (int(part) if part.isdigit() else part for part in key.split("."))
        target = values
        for parent in parents:
            target = target[parent]
        if value is GONE:
            del target[leaf]
        else:
            target[leaf] = value
    return values


def refused(values) -> str:
    with pytest.raises(ValueError) as caught:
        parse(values, "my.toml")
    message = str(caught.value)
    assert all(line.startswith("my.toml: ") for line in message.splitlines()), message
    return message


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_our_recipes(path):
    recipe = load(str(path))
    assert recipe.name == path.stem and ("pretrain" in recipe.stages or "path" in recipe.model)
    # each says what it takes and what to expect
    head = path.read_text(encoding="utf-8").partition("\nname =")[0]
    for word in ("hardware", "time", "cost", "expect"):
        assert re.search(rf"^#\s+{word}\s+\S", head, re.MULTILINE), word


@pytest.mark.parametrize(
    "key, wrong, nearest",
    [
        ("sed", 1, "seed"),
        ("pretain", {"steps": 1}, "pretrain"),
        ("prepare.document", 5, "documents"),
        ("pretrain.batchsize", 5, "batch_size"),
        ("pretrain.foo", 5, None),
        ("evaluate.problem", 5, "problems"),
        ("model.hidden_sise", 5, "hidden_size"),
        ("model.num_experts", 5, "n_routed_experts"),
        ("model.paht", "x", "path"),
        ("prepare.tasks.0.shares", 5, "share"),
    ],
)
def test_unknown_keys_name_file_key_and_nearest(key, wrong, nearest):
    message = refused(changed({key: wrong}))
    assert message.startswith(f"my.toml: {key}: unknown key")
    assert (f"did you mean {nearest!r}?" if nearest else "known: steps, sequence_length, ") in message


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"pretrain.steps": 0}, "pretrain.steps: Input should be greater than or equal to 1 (is 0)"),
        ({"pretrain.lr": -1.0}, "pretrain.lr: Input should be greater than 0 (is -1.0)"),
        ({"pretrain.lr": "fast"}, "pretrain.lr: Input should be a valid number, unable to parse string as a number (is 'fast')"),
        ({"pretrain.steps": 1.5}, "pretrain.steps: Input should be a valid integer, got a number with a fractional part (is 1.5)"),
        ({"pretrain.betas": [0.9]}, "pretrain.betas.1: Field required"),
        ({"pretrain.schedule": "linear"}, "pretrain.schedule: Input should be 'constant', 'cosine' or 'wsd' (is 'linear')"),
        ({"pretrain.steps": GONE}, "pretrain.steps: Field required"),
        ({"prepare.validation_share": 0.5}, "prepare.validation_share: Input should be less than 0.5 (is 0.5)"),
        ({"prepare.tasks": "arithmetic"}, "prepare.tasks: Input should be a valid tuple (is 'arithmetic')"),
        ({"prepare.tasks.0.share": 0}, "prepare.tasks.0.share: Input should be greater than 0 (is 0)"),
        ({"prepare.tasks.0.task": "arithmetics"}, "prepare.tasks.0.task: unknown 'arithmetics'; known: arithmetic, countdown"),
        ({"prepare.tasks.0.options": {"digit": 2}}, "prepare.tasks.0.task arithmetic: unknown option 'digit'; known: digits, operations"),
        ({"prepare.tasks.0.options": {"digits": 99}}, "prepare.tasks.0.digits: must be between 1 and 12, is 99"),
        ({"prepare.tasks.0.options": {"digits": "3"}}, "prepare.tasks.0.task arithmetic: digits: must be int, is '3'"),
        ({"name": "../up"}, "name: String should match pattern"),
        ({"name": GONE}, "name: Field required"),
        ({"model": 5}, "model: Input should be a valid dictionary (is 5)"),
        ({"device": "tpu"}, "device: Input should be 'auto', 'cpu' or 'cuda' (is 'tpu')"),
    ],
)
def test_values_out_of_range_or_of_a_wrong_type(changes, complaint):
    assert refused(changed(changes)).startswith(f"my.toml: {complaint}")


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"hidden_size": GONE}, "model.hidden_size: missing"),
        ({"hidden_size": "wide"}, "model.hidden_size: Input should be a valid integer (is 'wide')"),
        ({"hidden_size": True}, "model.hidden_size: Input should be a valid integer (is True)"),
        ({"hidden_size": 32.0}, "model.hidden_size: Input should be a valid integer (is 32.0)"),
        ({"rope_theta": "1e4"}, "model.rope_theta: Input should be a valid number (is '1e4')"),
        ({"rope_interleave": 1}, "model.rope_interleave: Input should be a valid boolean (is 1)"),
        ({"rope_scaling": "yarn"}, "model.rope_scaling: Input should be a valid dictionary (is 'yarn')"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "needs 'factor'"),
        ({"scoring_func": "sigmod"}, "model.scoring_func: Input should be 'sigmoid' or 'softmax' (is 'sigmod')"),
        ({"model_type": "deepseek"}, "model.model_type: unknown 'deepseek'; known: deepseek_v3, "),
        ({"num_experts_per_tok": 9}, "model.num_experts_per_tok: must be between 1 and n_routed_experts 4, is 9"),
        ({"qk_rope_head_dim": 7}, "model.qk_rope_head_dim: rotary width must be even, is 7"),
        # what its family's config.json cannot say would fail at the first checkpoint
        ({"mlp_bias": True}, "model_type deepseek_v3: cannot express mlp_bias=True"),
        ({"kv_lora_rank": GONE, "head_dim": 16}, "model_type deepseek_v3: missing field 'kv_lora_rank'"),
        ({"model_type": "llama"}, "model_type llama: cannot express"),
    ],
)
def test_impossible_models(changes, complaint):
    assert complaint in refused(changed({f"model.{key}": value for key, value in changes.items()}))


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"prepare": GONE}, "[pretrain] needs [prepare]: there is nothing to train on"),
        ({"pretrain": GONE}, "[evaluate] needs [pretrain], or model.path: there is no model to begin with"),
        (
            {"prepare": GONE, "pretrain": GONE, "evaluate": GONE},
            "the recipe has no stage; add one of [prepare], [pretrain], [sft], [rl], [evaluate]",
        ),
        ({"pretrain.sequence_length": 129}, "pretrain.sequence_length: 129 is more than model.max_position_embeddings 128"),
        ({"pretrain.micro_batch_size": 3}, "pretrain.micro_batch_size: 3 does not divide batch_size 4"),
        ({"pretrain.warmup_steps": 20}, "pretrain.warmup_steps: must be less than steps 20, is 20"),
        ({"pretrain.schedule": "wsd"}, "pretrain.decay_steps: wsd needs 1 to steps - warmup_steps = 20, is 0"),
        ({"pretrain.decay_steps": 5}, "pretrain.decay_steps: only wsd has them, schedule is 'cosine'"),
        ({"pretrain.minimum_lr": 0.5}, "pretrain.minimum_lr: 0.5 is more than lr 0.001"),
        ({"prepare.sources": ["a.txt"]}, "prepare.sources: give either these or tasks"),
        ({"prepare.tasks": []}, "prepare.sources: give either these or tasks"),
        ({"prepare.tasks": [], "prepare.sources": ["a.txt"]}, "prepare.documents: counts generated problems; sources are read whole"),
        ({"prepare.documents": 0}, "prepare.documents: say how many to generate from tasks"),
        ({"model": {"path": "m", "hidden_size": 4}}, "model.hidden_size: comes from model.path's config.json; remove it or the path"),
        ({"model": {"path": 5}}, "model.path: Input should be a valid string (is 5)"),
    ],
)
def test_what_does_not_fit_together(changes, complaint):
    assert refused(changed(changes)) == f"my.toml: {complaint}"


def test_all_errors_are_told_at_once():
    message = refused(changed({"pretrain.steps": 0, "evaluate.problem": 3, "seeds": 1}))
    assert [line.split(": ")[1] for line in message.splitlines()] == ["pretrain.steps", "evaluate.problem", "seeds"]


def test_a_model_to_train_further_needs_no_numbers():
    recipe = parse(changed({"model": {"path": "somewhere/else"}}), "my.toml")
    assert recipe.stages == ("prepare", "pretrain", "evaluate") and recipe.model == {"path": "somewhere/else"}


@pytest.mark.parametrize(
    "assignment, key, value",
    [
        ("pretrain.steps=7", "pretrain.steps", 7),
        ("pretrain.steps = 7", "pretrain.steps", 7),
        ("pretrain.lr=3e-4", "pretrain.lr", 3e-4),
        ("pretrain.recompute=true", "pretrain.recompute", True),
        ("name=other", "name", "other"),
        ("name='quoted'", "name", "quoted"),
        ("model.path=runs/a=b", "model.path", "runs/a=b"),
        ("pretrain.betas=[0.8, 0.9]", "pretrain.betas", [0.8, 0.9]),
        ('prepare.tasks=[{task="countdown"}]', "prepare.tasks", [{"task": "countdown"}]),
        ("model.rope_scaling.factor=2", "model.rope_scaling.factor", 2),
        ("new.section.key=1", "new.section.key", 1),
    ],
)
def test_overrides(assignment, key, value):
    values = copy.deepcopy(TINY)
    override(values, [assignment])
    found = values
    for part in key.split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("assignment", ["steps", "=5", "--stage", "name.first=1", "prepare.tasks.task=1"])
def test_bad_overrides(assignment):
    with pytest.raises(ValueError, match=re.escape(repr(assignment))):
        override(copy.deepcopy(TINY), [assignment])


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_load(tmp_path):
    path = write(tmp_path / "my.toml", tomli_w.dumps(TINY))
    assert load(path, ["pretrain.steps=9", "pretrain.steps=8", "name=x"]).pretrain.steps == 8  # the last one holds
    with pytest.raises(ValueError, match=rf"^{re.escape(path)}: pretrain\.stepps: unknown key; did you mean 'steps'\?$"):
        load(path, ["pretrain.stepps=9"])
    bad = write(tmp_path / "bad.toml", "name = 'a'\nseed 1\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(bad)}: not TOML: .*line 2"):
        load(bad)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ValueError, match=r"latin\.toml: not TOML: .*utf-8"):
        load(str(tmp_path / "latin.toml"))


def test_find(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("quickstart") == find("quickstart.toml") and find("quickstart").samefile(RECIPES[0].parent / "quickstart.toml")
    for name in ("quickstarts", "mine/quickstart.toml", "/nowhere/quickstart", "", "."):  # a mistyped path must not run another recipe
        with pytest.raises(ValueError, match=rf"^{re.escape(name)}: no such recipe file"):
            find(name)
    write(tmp_path / "quickstart.toml", "")
    assert find("quickstart.toml") == Path("quickstart.toml")  # the user's own comes first


@pytest.mark.parametrize("path", [None, *RECIPES], ids=lambda p: p.stem if p else "tiny")
def test_saved_recipe_is_the_same_recipe(path, tmp_path):
    recipe = load(str(path)) if path else parse(TINY, "tiny")
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert load(str(tmp_path / "recipe.toml")) == recipe
    written = tomllib.loads(recipe.to_toml())
    stage = next(stage for stage in TRAINING if stage in recipe.stages)
    assert written[stage]["betas"] == list(getattr(recipe, stage).betas) and written["device"] == recipe.device  # defaults too
    assert written["model"] == (recipe.model if path else TINY["model"])


@settings(max_examples=30, deadline=None)
@given(
    pretrain=st.fixed_dictionaries(
        {"steps": st.integers(30, 10**9), "sequence_length": st.integers(8, 128), "batch_size": st.just(12)},
        optional={
            "micro_batch_size": st.sampled_from([1, 2, 3, 12]),
            "warmup_steps": st.integers(0, 29),
            "betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)).map(list),
            "weight_decay": st.floats(0, 10),
            "recompute": st.booleans(),
        },
    ),
    lr=st.floats(1e-12, 10),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,10}", fullmatch=True),
)
def test_any_accepted_recipe_survives_saving(pretrain, lr, name):
    recipe = parse(changed({"pretrain": pretrain | {"lr": lr}, "name": name}), "my.toml")
    assert parse(tomllib.loads(recipe.to_toml()), "again") == recipe


def test_config_is_the_model_section():
    config = parse(TINY, "tiny").config()
    assert config == ModelConfig(**TINY["model"])
    lists = parse(changed({"model.eos_token_id": [3, 5]}), "tiny").config()  # TOML's lists are the config's tuples
    assert lists.eos_token_id == (3, 5)


def test_a_recipe_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Recipe.model_validate(TINY).name = "other"
