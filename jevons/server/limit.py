"""Every limit of the server and its default, in one place: what is refused, with which status, before it can cost anything.

Limits that depend on the model (its positions, its cache) are the engine's and hold beside these.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for. Past a limit: 413 for the body, 408 for its time, 503 for the queue, else 400 naming the field."""

    max_body_bytes: int = 4 * 2**20
    body_timeout: float = 30.0  # seconds for the whole body to arrive
    max_depth: int = 64  # of brackets in a JSON body
    max_prompt_tokens: int = 2**20  # and never more than the model's positions or the cache hold
    max_messages: int = 4096
    max_prompts: int = 256  # of one completions or embeddings request
    max_n: int = 16  # also best_of
    max_stop: int = 16
    max_stop_length: int = 256  # characters
    max_stop_ids: int = 64
    max_logprobs: int = 20
    max_logit_bias: int = 1024
    max_tools: int = 128
    max_schema_bytes: int = 65536  # a grammar's source: a schema, a regular expression, or the tools that a reply is held to
    max_user_bytes: int = 512
    max_queue: int = 256  # requests that wait beside those that run
    default_max_tokens: int | None = None  # of chat; None: up to the end of the context
    keep_alive: float = 15.0  # seconds without news until a stream gets a comment

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise ValueError(f"{name}: must be above 0, is {value}")
