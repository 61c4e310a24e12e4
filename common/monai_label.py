"""MONAI Label's web application, with answers that say what is wrong with a label map.

MONAI Label's own answer to whatever a bundle raises is "Internal Server Error"; the reason stands in the server's log
alone. This is the same application, to be named when the server starts: `--uvicorn_app common.monai_label:app`.
"""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse
from monailabel.app import app

from .errors import refusal


@app.exception_handler(Exception)
def answer(request: Request, error: Exception) -> JSONResponse:
    """What a bundle refuses as status 422 and `{"detail": reason}`, FastAPI's form for a request that can't be served.

    Errors of other origin, which may be bugs, stay a status 500. All go on to the server's log.
    """
    cause = refusal(error)
    if cause is None:
        return JSONResponse({"detail": "Internal Server Error"}, 500)
    return JSONResponse({"detail": str(cause)}, 422)
