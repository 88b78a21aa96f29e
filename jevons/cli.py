"""The verbs. Each imports what it needs when it is called: `import jevons.cli` must not wait for torch."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jevons.stages.key import URL, keys

app = typer.Typer(
    name="jevons",
    help="A small team's own DeepSeek: pretrain, measure and talk to a sparse language model from one recipe file.",
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
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that comes with Jevons: quickstart, text, nano.")],
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
    from jevons.stages.life import live

    live(recipe, overrides or [], root, stage=stage, again=start)


@app.command()
def quickstart(
    overrides: Overrides = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Talk to the model afterwards, where there is a terminal.")] = True,
    root: Root = Path("runs"),
) -> None:
    """Train a small DeepSeek-V3-style model that does sums with written steps, in minutes on a CPU, and talk to it."""
    from jevons.stages.life import live

    folder = live("quickstart", overrides or [], root)
    if chat and sys.stdin.isatty() and sys.stdout.isatty():
        talk(str(folder))


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
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Talk to a model. Without a terminal, each line of standard input is a turn."""
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"--dtype: must be bfloat16 or float32, is {dtype!r}")
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
    dtype: Annotated[str, typer.Option(help="What is computed in: bfloat16 or float32 (plain weights only).")] = "bfloat16",
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
    by_key: Annotated[bool, typer.Option("--keys", help="What was served instead: a line a key.")] = False,
    since: Annotated[str | None, typer.Option(help="With --keys: from 7d ago on, or from a date.", show_default="ever")] = None,
    compare: Annotated[str, typer.Option(help="With --keys: a model of the price table to compare with.")] = "deepseek-flash",
    prices: Annotated[Path | None, typer.Option(help="With --keys: a price file of your own.", show_default=False)] = None,
    ledger: URL = None,  # of what was served; runs keep theirs beside them
    root: Root = Path("runs"),
) -> None:
    """What runs cost: tokens, time, FLOPs and money, stage by stage, beside what was planned.

    With --keys, what each key used of the server, and what the same tokens would have cost at another provider's prices.
    """
    from rich.console import Console

    if by_key:
        if run:
            raise ValueError(f"--keys: is about what was served, not about a run; leave {run!r} away")
        from jevons.stages.key import bill

        return Console().print(bill(root, ledger, since, compare, prices))
    from jevons.cost.ledger import Ledger
    from jevons.cost.receipt import render

    folder = Path(run) if run else None
    if folder and (folder / "recipe.toml").exists():
        root = folder.parent
    if not (root / "ledger.db").exists():
        raise ValueError(f"{root / 'ledger.db'}: no ledger; runs are kept in {root} (change it with --runs)")
    rows: list[Any] = Ledger(root / "ledger.db").rows(folder.name if folder else None)
    if not rows:
        raise ValueError(f"{run}: no such run in {root / 'ledger.db'}")
    Console().print(render(rows))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write a run's report.html anew and print its path."""
    if not (run / "recipe.toml").exists():
        raise ValueError(f"{run}: not a run's folder")
    from jevons.report import write_report

    print(write_report(run))


if __name__ == "__main__":
    main()
