"""Errors in the form in which OpenAI's API gives them."""

from __future__ import annotations

from typing import Any

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
"""By status; the others are ``invalid_request_error``."""


class ApiError(Exception):
    """A request is refused or has failed.

    Args:
        status: Of HTTP.
        message: One sentence: what, and the remedy.
        parameter: Of the request, where one is wrong.
        code: A word that programs can compare.
    """

    def __init__(self, status: int, message: str, *, parameter: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.parameter, self.code = status, message, parameter, code

    def body(self) -> dict[str, Any]:
        """Returns the response's JSON."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.parameter, "code": self.code}}
