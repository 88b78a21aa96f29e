"""The verbs. Each imports what it needs when it is called: `import jevons.cli` must not wait for torch."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from jevons.stages.key import URL, keys

app = typer.Typer(
    name="jevons",
    help="A small team's own DeepSeek: train a sparse language model from one recipe file, teach it to reason, serve it, see what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(keys)
Root = Annotated[Path, typer.Option("--runs", help="The folder that holds all runs and their ledger.", envvar="JEVONS_RUNS")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as dotted.key=value.", show_default=False)]


def main() -> None:
    """The console script: a user's mistake ends in one clear message, anything else in a traceback (JEVONS_DEBUG=1: always)."""
    # Before torch is loaded: OpenMP threads sleep while they wait. Spinning ones are some 8 % faster on a quiet machine
    # and ten times slower when anything else wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Large tensors on huge pages, a switch of torch's: products that stream weights from memory are 1.3 times faster
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app()
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("JEVONS_DEBUG"):
            raise
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        print(f"error: {error}" + ("\nThe disk is full; nothing that was saved before is lost." if full else ""), file=sys.stderr)
        sys.exit(1)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A file, or one that comes with Jevons: quickstart, text, nano, sft, reason, memory.")],
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option("--stage", help="Run this stage only.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="Throw away the results from this stage on, and start over there.")] = None,
    root: Root = Path("runs"),
) -> None:
    """Run a recipe, or continue where it stopped.

    Stages that are done are skipped; one that was interrupted goes on from its last checkpoint, bit for bit as if it had
    never stopped. Ctrl-C and SIGTERM save before they stop.

    jevons run quickstart name=tiny model.num_hidden_layers=2 pretrain.steps=100
    """
    _check(recipe, overrides)
    from jevons.stages.life import live

    live(recipe, overrides or [], root, stage=stage, again=start)


@app.command()
def plan(
    name: Annotated[str | None, typer.Argument(help="A recipe, a model's folder or published name.", show_default=False)] = None,
    overrides: Overrides = None,
    on: Annotated[str | None, typer.Option(help="Devices: 8xH100; here: this machine.", show_default="the recipe's, else here")] = None,
    budget: Annotated[float | None, typer.Option(help="Dollars: also say the best model for them.", show_default=False)] = None,
    target_tokens: Annotated[str | None, typer.Option(help="Pretrain on so many, as 10B.", show_default="the recipe's steps")] = None,
    share: Annotated[float | None, typer.Option(help="Share of peak that training reaches.", show_default="what is known")] = None,
    serve: Annotated[str | None, typer.Option(help="Also plan serving a recipe's model, on these devices.", show_default=False)] = None,
    weights: Annotated[str, typer.Option(help="As they are served: bf16, fp8, int8, int4.")] = "bf16",
    prompt: Annotated[int, typer.Option(help="Tokens of a mean request to the server.")] = 2000,
    cached: Annotated[int, typer.Option(help="Of them, those found in the cache.")] = 1000,
    output: Annotated[int, typer.Option(help="Tokens of a mean answer.")] = 500,
    requests: Annotated[float, typer.Option(help="A day; others' prices are compared at this traffic.")] = 10_000,
    slowest: Annotated[float, typer.Option(help="Seconds that a served token may take.")] = 0.05,
    hardware: Annotated[Path | None, typer.Option(help="A TOML file of devices beside the built-in table.", show_default=False)] = None,
    prices: Annotated[Path | None, typer.Option(help="A TOML file of API prices beside the built-in table.", show_default=False)] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="First measure its stages and serving here, a minute each.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="A file for everything; - prints it instead.", show_default=False)] = None,
    root: Root = Path("runs"),
) -> None:
    """What a recipe, a model or a budget will take before anything runs: time, money, memory, and what would fit.

    jevons plan deepseek-v3 --serve 8xH100 --weights fp8

    jevons plan --budget 500 --on 8xH100
    """
    from jevons.stages.outline import tell
    from jevons.stages.plan import Options

    where = {"on": on, "share": share, "hardware": hardware, "prices": prices, "root": root}
    served = {"serve": serve, "weights": weights, "prompt": prompt, "cached": cached, "output": output, "requests": requests}
    options = Options(budget=budget, target_tokens=target_tokens, slowest=slowest, **where, **served)  # type: ignore[arg-type]
    tell(name, overrides or [], options, calibrate=calibrate, json=json)


@app.command()
def quickstart(
    overrides: Overrides = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Talk to the model afterwards, where there is a terminal.")] = True,
    root: Root = Path("runs"),
) -> None:
    """Train a small DeepSeek-V3-style model that does sums with written steps, in minutes on a CPU, and talk to it."""
    _check("quickstart", overrides)
    from jevons.stages.life import live

    folder = live("quickstart", overrides or [], root)
    if chat and sys.stdin.isatty() and sys.stdout.isatty():
        talk(str(folder))


def _check(recipe: str, overrides: list[str] | None) -> None:
    """A mistake in a recipe is told at once: torch takes seconds to load."""
    from jevons.recipe import load

    load(recipe, overrides or [])


@app.command("chat")
def talk(
    model: Annotated[str, typer.Argument(help="A run's folder, a Hugging Face folder, or a hub name.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Ask this and leave; may be given several times.")] = None,
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens.")] = 2048,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this much probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0 from all.")] = 0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same reply.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32; auto: bfloat16 where the device multiplies it.")] = "auto",
) -> None:
    """Talk to a model. Without a terminal, each line of standard input is a turn."""
    if dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"--dtype: must be auto, bfloat16 or float32, is {dtype!r}")
    from jevons.engine.sequence import SamplingParams
    from jevons.stages.chat import Chat
    from jevons.stages.chat import chat as converse

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    converse(Chat.open(model, dtype=dtype, params=params, system=system), prompt or [])


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A run's folder, a Hugging Face folder, or a hub name.")],
    host: Annotated[str, typer.Option(help="Address to listen on. Not only this machine: needs a key, or --insecure.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one and prints it.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients.", show_default="the folder's")] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="How weights are kept: bf16, int8 (half the memory), int4 (a third), packed for this processor; or plain, as torch has "
            "them. auto: bf16 where the native kernels compile, else plain."
        ),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="What is computed in: bfloat16, or float32 (plain weights only). auto: bfloat16 where the device has it.")
    ] = "auto",
    cache_gb: Annotated[float, typer.Option("--cache-gb", help="Memory for cached keys and values, GiB.")] = 1.0,
    max_sequences: Annotated[int, typer.Option(help="Answers under way at once; others wait.")] = 64,
    max_batch_tokens: Annotated[
        int, typer.Option(help="Tokens a step: larger reads prompts faster, smaller lets running answers wait less for them.")
    ] = 512,
    draft: Annotated[
        str,
        typer.Option(
            help="Guess tokens ahead while few requests run; the text is the same either way. mtp: by the model's own module, "
            "ngram: by repetition, none. auto: mtp where the model has one, else ngram."
        ),
    ] = "auto",
    draft_tokens: Annotated[int, typer.Option(help="Tokens that ngram guesses at once.")] = 3,
    ledger: URL = None,
    root: Root = Path("runs"),
    prices: Annotated[Path | None, typer.Option(help="A TOML file of prices beside the built-in table; see docs/COST.md.")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Dollars an hour of this device, where no price is set.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen on any address without keys.")] = False,
    page: Annotated[bool, typer.Option("--page/--no-page", help="The chat page at /.")] = True,
    cors: Annotated[list[str] | None, typer.Option(help="An origin whose pages may call, such as https://chat.example.org.")] = None,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; beyond, 503 with retry-after.")] = 256,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Longest prompt.", show_default="what fits")] = None,
    max_body_mb: Annotated[float, typer.Option(help="Largest request body, MiB.")] = 4.0,
    header_timeout: Annotated[float, typer.Option(help="Seconds for a request's headers to arrive.")] = 10.0,
    drain: Annotated[float, typer.Option(help="Seconds that answers under way get after SIGTERM.")] = 30.0,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="A line a request: path and status, never prompts or keys.")] = False,
) -> None:
    """Serve a model: the APIs of OpenAI, DeepSeek and Anthropic, a chat page, and a meter.

    Every request leaves a row in the ledger: key, tokens, seconds, money (`jevons receipt --keys`). Fields, errors and
    limits are in docs/API.md.

    jevons serve runs/quickstart

    jevons serve Qwen/Qwen2.5-0.5B-Instruct --weights int8

    curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json'
    -d '{"model": "quickstart", "messages": [{"role": "user", "content": "12+34=?"}]}'
    """
    from jevons.server.limit import Limits
    from jevons.stages.serve import Options
    from jevons.stages.serve import serve as run_server

    limits: dict[str, Any] = {"max_queue": max_queue, "max_body_bytes": round(max_body_mb * 2**20)}
    if max_prompt_tokens is not None:
        limits["max_prompt_tokens"] = max_prompt_tokens
    run_server(
        Options(
            model=model,
            name=name,
            host=host,
            port=port,
            weights=weights,
            dtype=dtype,
            cache_gb=cache_gb,
            max_sequences=max_sequences,
            max_batch_tokens=max_batch_tokens,
            draft=draft,
            draft_tokens=draft_tokens,
            ledger=ledger or str(root / "ledger.db"),
            prices=prices,
            price_per_hour=price_per_hour,
            insecure=insecure,
            page=page,
            cors=tuple(cors or ()),
            drain=drain,
            header_timeout=header_timeout,
            log_requests=log_requests,
            limits=Limits(**limits),
        )
    )


@app.command("eval")
def examine(
    models: Annotated[list[str], typer.Argument(help="Runs' folders, Hugging Face folders or hub names; several are compared.")],
    task: Annotated[str, typer.Option(help="What to ask: arithmetic, countdown, gym, math, choice, code or custom.")],
    option: Annotated[list[str] | None, typer.Option(help="An option of the task, as digits=3; may be given several times.")] = None,
    problems: Annotated[int, typer.Option(help="How many problems, or all where the task has fewer.")] = 200,
    samples: Annotated[int, typer.Option(help="Answers to each problem; several also give pass@k and majority@k.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this much probability.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest reply, in tokens; a longer one is cut off.")] = 1024,
    max_turns: Annotated[int, typer.Option(help="Turns of the model, where the task has tools.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the problems and of the answers.")] = 0,
    split: Annotated[str, typer.Option(help="test, or train.")] = "test",
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    dtype: Annotated[
        str, typer.Option(help="What is computed in: bfloat16, or float32 (plain weights only). auto: bfloat16 where the device has it.")
    ] = "auto",
    weights: Annotated[str, typer.Option(help="How weights are kept, as for serve: auto, plain, bf16, int8, int4.")] = "auto",
    concurrency: Annotated[int, typer.Option(min=1, help="Answers under way at once.")] = 64,
    cache_gb: Annotated[float, typer.Option("--cache-gb", help="Memory for cached keys and values, GiB.")] = 1.0,
    failures: Annotated[int, typer.Option(min=0, help="Wrong answers shown of each model.")] = 3,
    price_per_hour: Annotated[float, typer.Option(help="Dollars an hour of this device.")] = 0.0,
    json: Annotated[
        Path | None,
        typer.Option("--json", help="The file of results; a page of the same name comes beside it.", show_default="in runs/evaluations"),
    ] = None,
    root: Root = Path("runs"),
) -> None:
    """Ask models problems whose answers can be checked: accuracy with its interval, length, difficulty, failures.

    All models get the same problems, so the differences between them are told with intervals of their own. Ctrl-C stops and
    tells what is known by then.

    jevons eval runs/quickstart --task arithmetic --option digits=3

    jevons eval runs/mine/sft/model runs/mine --task countdown --samples 8 --temperature 0.8
    """
    from jevons.stages.contest import Options, contest

    options = Options(
        models=tuple(models),
        task=task,
        task_options=tuple(option or ()),
        problems=problems,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        max_turns=max_turns,
        seed=seed,
        split=split,
        system=system,
        dtype=dtype,
        weights=weights,
        concurrency=concurrency,
        cache_gb=cache_gb,
        failures=failures,
        price_per_hour=price_per_hour,
        json=json,
        root=root,
    )
    if code := contest(options):
        sys.exit(code)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run's folder, a Hugging Face folder, or a hub name.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    mtp: Annotated[bool, typer.Option("--mtp/--no-mtp", help="Keep multi-token-prediction modules.")] = True,
) -> None:
    """Write a model as a Hugging Face folder, which transformers and the engines that read its format open."""
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"--dtype: must be bfloat16, float16 or float32, is {dtype!r}")
    if out.exists():
        raise ValueError(f"{out}: exists already; name a folder that does not")
    import torch

    from jevons.model.folder import companions, load_model, resolve, save_model
    from jevons.run import newest_model

    source = newest_model(Path(model).expanduser())
    source = source if source.is_dir() else resolve(model)
    save_model(load_model(source, dtype=getattr(torch, dtype), mtp=mtp), out, companions=companions(source))
    print(out)


@app.command()
def receipt(
    run: Annotated[str | None, typer.Argument(help="A run's folder or name; all runs without it.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All runs, all that was served, and a line a key.")] = False,
    by_key: Annotated[bool, typer.Option("--keys", help="What each key used of the server, and nothing else.")] = False,
    since: Annotated[str | None, typer.Option(help="What began 7d ago or later, or after a date.", show_default="ever")] = None,
    compare: Annotated[str, typer.Option(help="A model of the price table to compare with what was served.")] = "deepseek-flash",
    prices: Annotated[Path | None, typer.Option(help="A price file of your own.", show_default=False)] = None,
    json: Annotated[str | None, typer.Option("--json", help="A file to write as JSON; - prints.", show_default=False)] = None,
    csv: Annotated[str | None, typer.Option("--csv", help="A file to write as CSV, a line a stage; - prints.", show_default=False)] = None,
    html: Annotated[Path | None, typer.Option("--html", help="A file to write as a page that stands alone.", show_default=False)] = None,
    ledger: URL = None,
    root: Root = Path("runs"),
) -> None:
    """What runs and servers cost, planned beside actual: tokens, time, FLOPs, memory and money, and where the money went.

    Also what a right answer, a point of accuracy gained by RL and a million served tokens came to, idle time counted, and what
    those tokens would have cost elsewhere.

    jevons receipt runs/quickstart --html receipt.html
    """
    from rich.console import Console

    from jevons.cost.price import Prices
    from jevons.stages.invoice import gather
    from jevons.stages.key import parse_moment
    from jevons.stages.printout import write

    if run and (by_key or everything):
        raise ValueError(f"{'--keys' if by_key else '--all'}: is about what was served, not about one run; leave {run!r} away")
    found = gather(
        root,
        run,
        prices=Prices.load(prices),
        compare=compare,
        ledger=ledger,
        since=None if since is None else parse_moment(since, time.time(), -1, "--since"),
        runs=everything or not by_key,
        keys=everything or by_key,
    )
    write(found, Console(), json_file=json, csv_file=csv, html_file=html)


@app.command()
def claims(
    names: Annotated[list[str] | None, typer.Argument(help="Claims to tell in full; none: all, as a table.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As the page docs/CLAIMS.md.")] = False,
) -> None:
    """The numbers of the DeepSeek story, computed again: what was published, what comes out, and what to make of it.

    Ends with 1 where a verdict no longer follows from the figures.

    jevons claims v3-hours
    """
    from jevons.stages.claims import claims as tell

    if code := tell(names or [], as_json=as_json, markdown=markdown):
        sys.exit(code)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's report.html anew and print its path."""
    if not (run / "recipe.toml").exists():
        raise ValueError(f"{run}: not a run's folder")
    from jevons.report import write_report

    print(write_report(run))


if __name__ == "__main__":
    main()
