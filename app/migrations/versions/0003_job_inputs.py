"""Which folder of the store holds the pictures that a job's request brought."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("inputs", sa.String(32)))
    given = sa.text("inputs IS NOT NULL")
    op.create_index("ix_jobs_inputs", "jobs", ["inputs"], sqlite_where=given, postgresql_where=given)
