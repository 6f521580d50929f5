"""Errors as HTTP answers. Owns their one form, and the status of each of Penstock's errors."""

from fastapi.responses import JSONResponse

from penstock.errors import (
    ConfigError,
    DataError,
    EngineBusyError,
    EngineError,
    EngineRejectedError,
    LeaseLostError,
    PenstockError,
    RewardError,
    RewardUnavailableError,
    WeightsBusyError,
    WeightsConflictError,
    WeightsError,
    WeightsMismatchError,
)

RETRY_AFTER_SECONDS = 1  # a push takes about this long

# The first class that fits decides: subclasses come before their bases.
STATUS_OF_ERROR: tuple[tuple[type[Exception], int], ...] = (
    (WeightsConflictError, 409),
    (LeaseLostError, 409),
    (WeightsBusyError, 503),
    (WeightsMismatchError, 502),
    (WeightsError, 422),
    (EngineBusyError, 503),
    (EngineRejectedError, 422),
    (EngineError, 502),
    (RewardUnavailableError, 503),
    (RewardError, 422),
    (ConfigError, 422),
    (DataError, 422),
    (TimeoutError, 504),
    (PenstockError, 500),
)


def error_response(status: int, kind: str, detail: str) -> JSONResponse:
    """The one form of every error answer."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else None
    return JSONResponse({"error": kind, "detail": detail}, status_code=status, headers=headers)


def answer_to(error: Exception) -> JSONResponse:
    """The answer to a request that ended with one of Penstock's errors, or with a TimeoutError."""
    status = next(status for kind, status in STATUS_OF_ERROR if isinstance(error, kind))
    return error_response(status, error.kind if isinstance(error, PenstockError) else "timeout", str(error))
