"""How many of its owner's jobs a job may run beside, whether it runs alone, and an index of the turns that were had."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("at_once", sa.BigInteger))
    op.add_column("jobs", sa.Column("accompanied", sa.Boolean, nullable=False, server_default=sa.true()))
    served = sa.text("state != 'queued' AND started_at IS NOT NULL")
    op.create_index(
        "ix_jobs_served", "jobs", ["model", "priority", "turn"], sqlite_where=served, postgresql_where=served
    )
