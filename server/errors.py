"""What clients are told when something goes wrong: OpenAI's error shape and its HTTP status.

ApiError                 {"error": {"message", "type", "param", "code"}}
├── InvalidRequest 400   a field is wrong; `param` names it
├── Unauthorized 401     no API key, or one that does not count
├── Forbidden 403        the key does not allow this
├── NotFound 404         no such user, route, recipe
├── WrongMethod 405      the route exists, but not for this method
├── TooSlow 408          it did not arrive in time
├── Conflict 409         what the request acts on has already ended
│   └── UserErased       the user was erased while the request was in progress
├── TooLarge 413         a body that is too large
├── WrongMediaType 415   the body is not JSON
├── TooMany 429          a limit is reached, or too many wait; carries Retry-After
├── HeadersTooLarge 431  a request line and headers that are too large
├── EngineFailed 502     the engine's answer makes no sense, or broke off
└── Unavailable 503      a part is down; carries Retry-After
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import ClassVar

from adapters.errors import MtaError


class ApiError(MtaError):
    """An error with an HTTP status. `param` is the request field at fault, in dots (`items.3.text`)."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code

    @property
    def headers(self) -> dict[str, str]:
        return {}

    @property
    def explained(self) -> str:
        """The message and its cause: for logs and operators only, since causes name internal addresses."""
        return f"{self.message} ({self.__cause__})" if self.__cause__ else self.message


class InvalidRequest(ApiError):
    status, kind, default_code = 400, "invalid_request_error", "invalid_value"


class Unauthorized(ApiError):
    status, kind, default_code = 401, "authentication_error", "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(ApiError):
    status, kind, default_code = 403, "permission_error", "missing_scope"


class NotFound(ApiError):
    status, kind, default_code = 404, "not_found_error", "not_found"


class WrongMethod(ApiError):
    status, kind, default_code = 405, "invalid_request_error", "method_not_allowed"


class TooSlow(ApiError):
    status, kind, default_code = 408, "invalid_request_error", "request_timeout"


class Conflict(ApiError):
    status, kind, default_code = 409, "invalid_request_error", "conflict"


class UserErased(Conflict):
    default_code = "user_erased"

    def __init__(self) -> None:
        super().__init__(
            "the user was erased while this request was in progress, and nothing of it is stored: send it again to "
            "store the user again",
            param="user_id",
        )


class TooLarge(ApiError):
    status, kind, default_code = 413, "invalid_request_error", "body_too_large"


class WrongMediaType(ApiError):
    status, kind, default_code = 415, "invalid_request_error", "unsupported_media_type"


class TooMany(ApiError):
    """One request too many; `limits` are headers that say how much of each limit is left."""

    status, kind, default_code = 429, "rate_limit_error", "rate_limit_exceeded"

    def __init__(
        self, message: str, *, retry_after_s: float, code: str | None = None, limits: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s
        self._limits = limits or {}

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, ceil(self.retry_after_s))), **self._limits}


class HeadersTooLarge(ApiError):
    status, kind, default_code = 431, "invalid_request_error", "headers_too_large"


class EngineFailed(ApiError):
    status, kind, default_code = 502, "engine_error", "engine_failed"


class Unavailable(ApiError):
    status, kind, default_code = 503, "service_unavailable", "unavailable"

    def __init__(self, message: str, *, code: str | None = None, retry_after_s: int = 5) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after_s)}
