"""The tables of experiments. Times are seconds since 1970 by the database's clock."""

from sqlalchemy import Boolean, Column, Double, Index, String, Table, Text

from app.database import metadata

# What a request drew in an experiment, or that it could not be drawn.
exposures = Table(
    "exposures",
    metadata,
    Column("id", String(32), primary_key=True),  # of the generation
    Column("experiment", String(64), primary_key=True),
    Column("arm", String(64), nullable=False),  # that drew
    Column("assigned", String(64), nullable=False),  # another one while that is switched off
    Column("version", String(12), nullable=False),
    Column("unit", String(32), nullable=False),
    Column("shadow", Boolean, nullable=False),
    Column("owner", Text, nullable=False),
    Column("model", String(64), nullable=False),
    Column("receipt_id", String(32)),
    Column("created_at", Double, nullable=False),
    Column("total_s", Double),  # none where nothing was drawn, but found or failed
    Column("engine_s", Double, nullable=False),  # that its pictures spent in the engine, added up
    Column("error", String(64)),  # its code
    Index("ix_exposures_experiment", "experiment", "version", "arm", "created_at"),
    Index("ix_exposures_receipt_id", "receipt_id"),
)

# What became of it: one of each kind for each generation, whoever says it how often.
outcomes = Table(
    "outcomes",
    metadata,
    Column("id", String(32), primary_key=True),  # of the generation
    Column("outcome", String(16), primary_key=True),
    Column("value", Double, nullable=False),  # 1 but for a rating
    Column("created_at", Double, nullable=False),
)
