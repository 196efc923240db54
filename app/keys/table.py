"""The table of API keys. Times are seconds since 1970 by the database's clock."""

from sqlalchemy import JSON, Column, Double, String, Table

from app.database import metadata

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("caller", String(16), nullable=False),  # the id of the first key of a line of rotated ones
    Column("name", String(100), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("limits", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
)
