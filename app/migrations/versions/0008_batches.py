"""Batches of jobs. Their lines are not counted among the jobs that wait alone."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "batches",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("cancelling_at", sa.Double),
    )
    op.create_index("ix_batches_owner", "batches", ["owner", "id"])
    op.add_column("jobs", sa.Column("batch", sa.String(32)))
    op.add_column("jobs", sa.Column("line", sa.Integer))
    op.add_column("jobs", sa.Column("custom_id", sa.Text))
    op.drop_index("ix_jobs_waiting", "jobs")
    _index("ix_jobs_waiting", "state = 'queued' AND batch IS NULL", "owner", "work")
    _index("ix_jobs_waiting_lines", "state = 'queued' AND batch IS NOT NULL", "owner", "work")
    _index("ix_jobs_batch", "batch IS NOT NULL", "batch", "line")


def _index(name: str, where: str, *columns: str) -> None:
    op.create_index(name, "jobs", list(columns), sqlite_where=sa.text(where), postgresql_where=sa.text(where))
