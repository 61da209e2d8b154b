"""A request that is refused: its status, and the error object that OpenAI's clients read."""

from __future__ import annotations

from typing import Any

from grun.errors import GrunError

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "overloaded_error"}
"""By status; those that are not named are of type invalid_request_error, from 500 on server_error."""


class Refused(GrunError):
    """A request that cannot be answered; the message is for whoever sent it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """`status`: of HTTP; `param`: the field that is wrong; `code`: a name that programs read."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What goes with it."""
        return {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(self.status, {})
