"""Experiments: exposures and outcomes."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "exposures",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("experiment", sa.String(64), primary_key=True),
        sa.Column("arm", sa.String(64), nullable=False),
        sa.Column("assigned", sa.String(64), nullable=False),
        sa.Column("version", sa.String(12), nullable=False),
        sa.Column("unit", sa.String(32), nullable=False),
        sa.Column("shadow", sa.Boolean, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("receipt_id", sa.String(32)),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("total_s", sa.Double),
        sa.Column("engine_s", sa.Double, nullable=False),
        sa.Column("error", sa.String(64)),
    )
    op.create_index("ix_exposures_experiment", "exposures", ["experiment", "version", "arm", "created_at"])
    op.create_index("ix_exposures_receipt_id", "exposures", ["receipt_id"])
    op.create_table(
        "outcomes",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("outcome", sa.String(16), primary_key=True),
        sa.Column("value", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
    )
