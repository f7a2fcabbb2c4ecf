"""
Requests in, JSON out: what every answer of the demo has in common.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lsn_consistency.demo.journal import first_line

CUSTOMER_COOKIE: Final = "shop_customer"
MAX_BODY_BYTES: Final = 512
NOT_STORED: Final = {"Cache-Control": "no-store"}

_CUSTOMER = re.compile(r"[0-9a-f]{8}")


def customer_of(request: Request) -> str:
    """
    Return the customer that the browser is known as, or a new one.
    """
    if "customer" not in request.scope:
        text = request.cookies.get(CUSTOMER_COOKIE, "")
        request.scope["customer"] = text if _CUSTOMER.fullmatch(text) else secrets.token_hex(4)
    customer: str = request.scope["customer"]
    return customer


def with_customer(request: Request, response: Response) -> Response:
    """
    Give a new customer the cookie by which it is known from then on.
    """
    customer = customer_of(request)
    if request.cookies.get(CUSTOMER_COOKIE) != customer:
        response.set_cookie(CUSTOMER_COOKIE, customer, httponly=True, samesite="lax")
    return response


def reply(request: Request, payload: Mapping[str, Any], status: int = 200) -> Response:
    """
    Return an answer that nothing on the way keeps.
    """
    return with_customer(request, JSONResponse(payload, status, headers=NOT_STORED))


async def body_of(request: Request) -> dict[str, Any]:
    """
    Return the JSON object that a request holds.

    Raises `HTTPException` for all else. That the type must be JSON also keeps pages of other sites
    out: a browser does not let them send it unasked.
    """
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "send application/json")
    text = b""
    async for chunk in request.stream():
        text += chunk
        if len(text) > MAX_BODY_BYTES:
            raise HTTPException(413, f"a request holds at most {MAX_BODY_BYTES} bytes")
    try:
        body = json.loads(text or b"{}")
    except ValueError:
        raise HTTPException(400, "the request is no JSON") from None
    if not isinstance(body, dict):
        raise HTTPException(400, "the request is no JSON object")
    return body


def whole(body: Mapping[str, Any], name: str, least: int, most: int) -> int:
    """
    Return a whole number of a request within its limits; raises `HTTPException`.
    """
    value = body.get(name)
    if type(value) is not int or not least <= value <= most:
        raise HTTPException(400, f"{name} is a whole number from {least} to {most}")
    return value


async def unavailable(request: Request, error: Exception) -> Response:
    """
    Answer an error of the database or of the router.
    """
    return JSONResponse({"error": first_line(error)}, 503, headers=NOT_STORED)


async def conflict(request: Request, error: Exception) -> Response:
    """
    Answer what is not possible now.
    """
    return JSONResponse({"error": str(error)}, 409, headers=NOT_STORED)


async def refused(request: Request, error: Exception) -> Response:
    """
    Answer a request that cannot be understood.
    """
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=NOT_STORED)
