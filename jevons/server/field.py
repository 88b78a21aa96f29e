"""Fields that several endpoints read: a strict base for request bodies, what the sampler is asked for, names of models, usage in a reply.

A field is honoured, or stands in its body's `ignored` with the reason, or is refused by name. A test compares docs/API.md with
these classes, so it cannot tell another story.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, WithJsonSchema, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from jevons.engine.sequence import Alternatives
from jevons.server import grammar
from jevons.server.conversation import read_stop, refused
from jevons.server.error import APIError
from jevons.server.limit import Limits

if TYPE_CHECKING:
    from jevons.server.service import ModelAlias, Service
    from jevons.server.ticket import Ticket

LEAST_LOGPROB = -9999.0  # JSON has no -inf


class Body(BaseModel):
    """A request body: exact types, unknown fields refused. `ignored`: fields taken and not looked at, and why."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)
    ignored: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if k not in cls.ignored} if isinstance(data, dict) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        schema.setdefault("properties", {}).update({k: {"description": f"Ignored: {why}"} for k, why in cls.ignored.items()})
        return schema


class StreamOptions(Body):
    ignored: ClassVar[Mapping[str, str]] = {"include_obfuscation": "chunks are not padded"}
    include_usage: bool | None = None


class StructuredOutputs(Body):
    """vLLM's field for what response_format cannot say. Exactly one is to be given."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema, as an object or as text")
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = Field(None, description="Lark or GBNF")

    def source(self) -> str:
        given = {name: value for name, value in self if value is not None}
        if len(given) != 1:
            raise APIError(400, f"structured_outputs: exactly one form must be given, are {len(given)}", param="structured_outputs")
        ((name, value),) = given.items()
        try:
            match name:
                case "json_":
                    return grammar.json_schema(json.loads(value) if isinstance(value, str) else value)
                case "json_object":
                    return grammar.json_object()
                case "regex":
                    return grammar.regex(value)
                case "choice":
                    return grammar.choice(value)
            return grammar.grammar(value)
        except ValueError as error:
            raise refused(error, "structured_outputs") from error
        except RecursionError as error:  # in a text: the body itself is bounded
            raise APIError(400, "structured_outputs: is nested too deeply", param="structured_outputs") from error


Stop = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]})]


class Sampling(Body):
    """How to draw: the fields that chat and text completions share, under the names of OpenAI, DeepSeek and vLLM."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0, description="Tokens before which the answer does not stop")
    temperature: float | None = Field(None, ge=0, le=2, description="Default 1; 0 takes the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1: off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, description="Token ids, as text, to bias")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop = Field(None, description="Where the answer ends; not part of it")
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    logprobs_mode: Literal["raw", "sampled"] | None = Field(
        None, description="raw (default): of the model's own distribution; sampled: of the one drawn from, after temperature and filters"
    )
    user: str | None = Field(None, description="As user_id, which comes first")
    user_id: str | None = Field(None, description="Whose prompt this is: cached prefixes are not shared between users")

    def drawing(self, service: Service) -> dict[str, Any]:
        """SamplingParams' fields that are here, None where not given; checked where the engine would not."""
        limits, vocab_size = service.limits, service.engine_loop.config.vocab_size
        bias = []
        for key, value in (self.logit_bias or {}).items():
            id = int(key) if key.isascii() and key.isdigit() and len(key) < 20 else -1
            if not 0 <= id < vocab_size:
                raise APIError(400, f"logit_bias: {key[:40]!r} is no token id below {vocab_size}", param="logit_bias")
            bias.append((id, value))
        at_most("logit_bias", len(bias), limits.max_logit_bias)
        at_most("stop_token_ids", len(self.stop_token_ids or ()), limits.max_stop_ids)
        return {
            "max_tokens": self.max_tokens,
            "min_tokens": self.min_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": tuple(bias) or None,
            "seed": self.seed,
            "stop_ids": tuple(self.stop_token_ids or ()),
        }

    def stops(self, limits: Limits) -> tuple[str, ...]:
        stops = read_stop(self.stop)
        at_most("stop", len(stops), limits.max_stop)
        for stop in stops:
            at_most("stop", len(stop), limits.max_stop_length, "characters each")
        return stops

    def enter(self, service: Service, ticket: Ticket) -> ModelAlias | None:
        """Check the model's name and mark the ticket with the user. None: the model's own name."""
        user = self.user_id if self.user_id is not None else self.user or ""
        at_most("user_id", len(user.encode()), service.limits.max_user_bytes, "bytes")
        ticket.user = user
        return resolve(service, self.model, ticket)

    def head(self, ticket: Ticket, prefix: str, kind: str) -> dict[str, Any]:
        """What a reply and each of its chunks begin with."""
        head = {"id": f"{prefix}-{ticket.request_id.removeprefix('req_')}", "object": kind, "created": int(ticket.started)}
        return head | {"model": self.model, "system_fingerprint": f"fp_jevons_{version('jevons')}"}

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def at_most(field: str, count: int, most: int, what: str = "entries") -> None:
    if count > most:
        raise APIError(400, f"{field}: at most {most:,} {what}, are {count:,}", param=field)


def resolve(service: Service, name: str, ticket: Ticket) -> ModelAlias | None:
    """The alias of that name, None for the model itself. 404 for other names, 403 where the key is not for this model."""
    alias = service.aliases.get(name)
    if alias is None and name != service.model_id:
        known = ", ".join([service.model_id, *service.aliases])
        raise APIError(404, f"model: {name[:100]!r} is not served here; there is {known}", param="model", code="model_not_found")
    allowed = ticket.account.models
    if allowed is not None and not {name, service.model_id} & set(allowed):
        raise APIError(403, f"model: this key may not use {name[:100]!r}", param="model", code="model_not_allowed")
    return alias


def usage(ticket: Ticket) -> dict[str, Any]:
    """OpenAI's usage with DeepSeek's fields and ours, from the row that was metered: a client sees what the ledger holds."""
    row = ticket.row
    assert row is not None, "usage is known once a request was metered"
    return {
        "prompt_tokens": row.prompt,
        "completion_tokens": row.completion,
        "total_tokens": row.prompt + row.completion,
        "prompt_cache_hit_tokens": row.cached,
        "prompt_cache_miss_tokens": row.prompt - row.cached,
        "prompt_tokens_details": {"cached_tokens": row.cached},
        "completion_tokens_details": {"reasoning_tokens": row.reasoning},
        "jevons": ticket.extras(),
    }


def best(logp: float, id: int, alternatives: Alternatives) -> tuple[float, Alternatives]:
    """A token's log-probability and the best alternatives, all finite. The token among the alternatives has the very same float in both."""
    pairs = [(i, max(value, LEAST_LOGPROB)) for i, value in alternatives]
    own = next((value for i, value in pairs if i == id), max(logp, LEAST_LOGPROB))
    return own, pairs
