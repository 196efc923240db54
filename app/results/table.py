"""The tables of results, and of the database's own id. Times are seconds since 1970 by the database's clock."""

from sqlalchemy import JSON, Column, Double, Index, String, Table, Text

from app.database import metadata

results = Table(
    "results",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", Text, nullable=False),
    Column("fingerprint", String(64)),  # none for what is not to be given out again
    Column("receipt", JSON, nullable=False),
    Column("images", JSON, nullable=False),  # [{index, seed, key, format, width, height, bytes, sha256, pixels_sha256}]
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False, index=True),
    Index("ix_results_fingerprint", "owner", "fingerprint", "created_at"),
)

# One row: which database this is, to the stores that its pictures are kept in.
places = Table("places", metadata, Column("id", String(32), primary_key=True))
