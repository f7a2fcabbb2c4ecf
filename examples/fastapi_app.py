"""
A FastAPI application with a consistency level for each route.

Run it against a primary and two streaming replicas::

    export PRIMARY="host=pg0 dbname=shop"
    export REPLICA_1="host=pg1 dbname=shop"
    export REPLICA_2="host=pg2 dbname=shop"
    uvicorn examples.fastapi_app:app --port 8000

Accounts are credited with ``POST /accounts/ann?amount=5``. The balance page is causal, the debit
reads on the primary, the leaderboard takes what any healthy replica has. The client here is no
browser: the token travels in the header ``X-Consistency-Token``, there and back.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException

from lsn_consistency import (
    AsyncRouter,
    Consistency,
    ConsistencyMiddleware,
    consistency,
    current_session,
)

router = AsyncRouter(
    primary=os.environ["PRIMARY"],
    replicas={"replica_1": os.environ["REPLICA_1"], "replica_2": os.environ["REPLICA_2"]},
)


@asynccontextmanager
async def lifespan(api: FastAPI) -> AsyncIterator[None]:
    async with router:
        async with router.write() as conn:
            await conn.execute(
                "CREATE TABLE IF NOT EXISTS accounts"
                " (name text PRIMARY KEY, balance bigint NOT NULL)"
            )
        yield


api = FastAPI(lifespan=lifespan)


async def balance_of(name: str) -> int | None:
    async with router.read() as conn:
        cursor = await conn.execute("SELECT balance FROM accounts WHERE name = %s", [name])
        row = await cursor.fetchone()
    return None if row is None else row[0]


def answer(**content: Any) -> dict[str, Any]:
    route = current_session().last_route
    return {**content, "role": route and route.role, "reason": route and route.reason}


@api.post("/accounts/{name}", status_code=201)
async def credit(name: str, amount: int) -> dict[str, Any]:
    async with router.write() as conn:
        await conn.execute(
            "INSERT INTO accounts VALUES (%(name)s, %(amount)s) ON CONFLICT (name)"
            " DO UPDATE SET balance = accounts.balance + %(amount)s",
            {"name": name, "amount": amount},
        )
    return {"name": name}


# No level named: CAUSAL, the router's default.
@api.get("/accounts/{name}")
async def show(name: str) -> dict[str, Any]:
    return answer(balance=await balance_of(name))


# A decision about money reads where the money is written.
@api.delete("/accounts/{name}")
@consistency(Consistency.STRONG)
async def close(name: str) -> dict[str, Any]:
    if await balance_of(name) != 0:
        raise HTTPException(409, "the account is not empty")
    shown = answer()
    async with router.write() as conn:
        await conn.execute("DELETE FROM accounts WHERE name = %s AND balance = 0", [name])
    return shown


# Nobody minds a leaderboard that is a little old, so it never burdens the primary.
@api.get("/leaderboard")
@consistency(Consistency.EVENTUAL)
async def leaderboard() -> dict[str, Any]:
    async with router.read() as conn:
        cursor = await conn.execute("SELECT name FROM accounts ORDER BY balance DESC LIMIT 10")
        names = [name for (name,) in await cursor.fetchall()]
    return answer(names=names)


app = ConsistencyMiddleware(
    api, router=router, secret_key=os.environ.get("SECRET_KEY", "for-the-example-only")
)
