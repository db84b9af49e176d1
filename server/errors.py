"""Errors returned to clients: an HTTP status and OpenAI's `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import ClassVar

from adapters.errors import MtaError

CLIENT_GONE = 499  # status recorded when the client disconnects before the response; it is never sent


class ApiError(MtaError):
    """An error with an HTTP status. `param` is the path of the invalid request field, e.g. `items.3.text`."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.headers: dict[str, str] = {}

    @property
    def explained(self) -> str:
        """The message and its cause, for logs and operators only: causes can contain internal addresses."""
        return f"{self.message} ({self.__cause__})" if self.__cause__ else self.message


class InvalidRequest(ApiError):  # `param` names the invalid field
    status, kind, default_code = 400, "invalid_request_error", "invalid_value"


class Unauthorized(ApiError):  # the API key is missing or invalid
    status, kind, default_code = 401, "authentication_error", "invalid_api_key"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.headers["WWW-Authenticate"] = "Bearer"


class Forbidden(ApiError):  # the API key does not allow this
    status, kind, default_code = 403, "permission_error", "missing_scope"


class QuotaExceeded(Forbidden):  # the tenant has used what it may
    default_code = "quota_exceeded"


class NotFound(ApiError):  # no such user, route, recipe
    status, kind, default_code = 404, "not_found_error", "not_found"


class WrongMethod(ApiError):
    status, kind, default_code = 405, "invalid_request_error", "method_not_allowed"


class TooSlow(ApiError):  # the request did not arrive in time
    status, kind, default_code = 408, "invalid_request_error", "request_timeout"


class Conflict(ApiError):  # the target of the request has already ended
    status, kind, default_code = 409, "invalid_request_error", "conflict"


class UserErased(Conflict):
    default_code = "user_erased"

    def __init__(self) -> None:
        super().__init__(
            "the user was erased while this request was in progress, and nothing was stored: send the request again "
            "to store the user again",
            param="user_id",
        )
        self.headers["X-Should-Retry"] = "false"  # OpenAI's clients would send it again by themselves


class Gone(ApiError):  # it was there, but its time is over
    status, kind, default_code = 410, "invalid_request_error", "gone"


class TooLarge(ApiError):
    status, kind, default_code = 413, "invalid_request_error", "body_too_large"


class WrongMediaType(ApiError):  # the body is not JSON
    status, kind, default_code = 415, "invalid_request_error", "unsupported_media_type"


class HeadersTooLarge(ApiError):  # request line and headers together
    status, kind, default_code = 431, "invalid_request_error", "headers_too_large"


class EngineFailed(ApiError):  # the engine's response is invalid or incomplete
    status, kind, default_code = 502, "engine_error", "engine_failed"


class _RetryableError(ApiError):
    """An error with `Retry-After`; `limits` are headers with the remaining amount of each limit."""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retry_after_s: float = 5,
        limits: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.headers |= {"Retry-After": str(max(1, ceil(retry_after_s))), **(limits or {})}


class TooMany(_RetryableError):  # a limit is reached, or the queue is full
    status, kind, default_code = 429, "rate_limit_error", "rate_limit_exceeded"


class Unavailable(_RetryableError):  # a part is down
    status, kind, default_code = 503, "service_unavailable", "unavailable"
