"""
The shop's tables and statements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import psycopg

SHOWN_ORDERS: Final = 8
"""How many of a customer's orders a read returns, the newest first."""

FULL_STOCK: Final = 500

SCHEMA: Final = f"""
CREATE TABLE products (
    id integer PRIMARY KEY,
    name text NOT NULL,
    cents integer NOT NULL,
    stock integer NOT NULL CHECK (stock >= 0)
);
CREATE TABLE orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer text NOT NULL,
    product_id integer NOT NULL REFERENCES products,
    quantity integer NOT NULL,
    placed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX orders_of_customer ON orders (customer, id);
INSERT INTO products (id, name, cents, stock) VALUES
    (1, 'Coffee beans', 1290, {FULL_STOCK}),
    (2, 'Teapot', 3450, {FULL_STOCK}),
    (3, 'Wool blanket', 7900, {FULL_STOCK}),
    (4, 'Desk lamp', 4800, {FULL_STOCK}),
    (5, 'Notebook', 650, {FULL_STOCK}),
    (6, 'Bicycle bell', 990, {FULL_STOCK});
"""

# The server's own word on who it is comes in the same statement as the rows.
_READ: Final = f"""
SELECT inet_server_port(),
       (SELECT count(*) FROM orders WHERE customer = %(customer)s),
       (SELECT coalesce(json_agg(o), '[]') FROM (
            SELECT o.id, p.name AS product, o.quantity, o.quantity * p.cents AS cents
            FROM orders o JOIN products p ON p.id = o.product_id
            WHERE o.customer = %(customer)s
            ORDER BY o.id DESC LIMIT {SHOWN_ORDERS}) o),
       (SELECT json_agg(p) FROM (SELECT * FROM products ORDER BY id) p)
"""

_TAKE: Final = "UPDATE products SET stock = stock - %s WHERE id = %s AND stock >= %s RETURNING name"

_ORDER: Final = """
INSERT INTO orders (customer, product_id, quantity) VALUES (%s, %s, %s) RETURNING id
"""

Connection = psycopg.AsyncConnection[Any]


class SoldOutError(Exception):
    """
    Say that a product's stock does not suffice.
    """


@dataclass(frozen=True, slots=True)
class View:
    """
    Hold what one server shows a customer; ``port`` is the server's own.
    """

    port: int
    total: int
    orders: list[dict[str, Any]]
    products: list[dict[str, Any]]


async def read_view(conn: Connection, customer: str) -> View:
    """
    Return what this server shows of a customer's orders, and the products.
    """
    cursor = await conn.execute(_READ, {"customer": customer})
    row = await cursor.fetchone()
    assert row is not None  # An aggregate without GROUP BY has exactly one row.
    return View(*row)


async def place_order(conn: Connection, customer: str, product_id: int, quantity: int) -> int:
    """
    Take a product from the stock and return the new order's number.

    Raises `SoldOutError` if the stock does not suffice or there is no such product.
    """
    taken = await conn.execute(_TAKE, (quantity, product_id, quantity))
    if await taken.fetchone() is None:
        raise SoldOutError(f"product {product_id} is sold out")
    cursor = await conn.execute(_ORDER, (customer, product_id, quantity))
    row = await cursor.fetchone()
    assert row is not None  # INSERT ... RETURNING gives the row or raises.
    return int(row[0])


async def restock(conn: Connection) -> None:
    """
    Fill the stock of every product.
    """
    await conn.execute("UPDATE products SET stock = %s", (FULL_STOCK,))
