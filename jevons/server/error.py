"""Errors that clients see: one exception with all that a reply to a failed request needs, in OpenAI's form.

    {"error": {"message", "type", "param", "code"}}        status, retry-after

Anthropic's form is made from the same exception by its own endpoint.
"""

from __future__ import annotations

import math
from typing import Any

TYPES = {400: "invalid_request_error", 401: "authentication_error", 402: "insufficient_balance", 403: "permission_error"}
TYPES |= {404: "not_found_error", 408: "timeout_error", 413: "request_too_large", 422: "invalid_request_error", 429: "rate_limit_error"}
TYPES |= {500: "server_error", 503: "overloaded_error"}


class APIError(Exception):
    """A request that cannot be answered: the HTTP status, what is wrong, which field, and after how many seconds to try again."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code or kind}}

    def headers(self) -> dict[str, str]:
        if self.retry_after is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after))), "retry-after-ms": str(math.ceil(self.retry_after * 1000))}
