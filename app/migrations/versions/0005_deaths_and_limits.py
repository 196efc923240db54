"""An index of the jobs that a worker died with; how many of its owner's jobs a job may run beside."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("at_once", sa.BigInteger))
    bereft = sa.text("deaths > 0")
    op.create_index("ix_jobs_bereft", "jobs", ["model", "deaths"], sqlite_where=bereft, postgresql_where=bereft)
