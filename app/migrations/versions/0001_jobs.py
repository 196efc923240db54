"""Jobs, their events, idempotency keys, webhook endpoints and deliveries."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_QUEUED = sa.text("state = 'queued'")
_LEASED = sa.text("lease_until IS NOT NULL")
_FINISHED = sa.text("finished_at IS NOT NULL")


def upgrade() -> None:
    _create_jobs()
    _create_what_belongs_to_jobs()
    _create_webhooks()


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("turn", sa.BigInteger, nullable=False),
        sa.Column("start_by", sa.Double, nullable=False),
        sa.Column("deadline_at", sa.Double),
        sa.Column("work", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("finished_at", sa.Double),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("deaths", sa.Integer, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("runner", sa.Text),
        sa.Column("lease_s", sa.Double),
        sa.Column("lease_until", sa.Double),
        sa.Column("progress", sa.JSON),
        sa.Column("outputs", sa.JSON, nullable=False),
        sa.Column("result", sa.JSON),
        sa.Column("error", sa.JSON),
        sa.Column("webhook", sa.JSON),
        sa.Column("retry_of", sa.String(32)),
        sa.Column("data_removed", sa.Boolean, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("told_at", sa.Double, nullable=False),
    )
    _index("ix_jobs_owner", "jobs", "owner", "id")
    _index("ix_jobs_turn", "jobs", "model", sa.text("priority DESC"), "turn", "start_by", "id", where=_QUEUED)
    _index("ix_jobs_lane", "jobs", "model", "priority", "owner", "start_by", "id", where=_QUEUED)
    _index("ix_jobs_ticket", "jobs", "model", "priority", "owner", "turn", where=_QUEUED)
    _index("ix_jobs_start_by", "jobs", "start_by", where=_QUEUED)
    _index("ix_jobs_waiting", "jobs", "owner", "work", where=_QUEUED)
    _index("ix_jobs_leased", "jobs", "lease_until", where=_LEASED)
    _index("ix_jobs_finished", "jobs", "data_removed", "finished_at", where=_FINISHED)


def _create_what_belongs_to_jobs() -> None:
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
    )
    op.create_table(
        "idempotency",
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("route", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("job_id", sa.String(32), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    )
    _index("ix_idempotency_job_id", "idempotency", "job_id")


def _create_webhooks() -> None:
    op.create_table(
        "endpoints",
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("url", sa.Text, primary_key=True),
        sa.Column("secrets", sa.JSON, nullable=False),
        sa.Column("disabled_at", sa.Double),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("job_id", sa.String(32), nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("event", sa.String(16), nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_at", sa.Double, nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("error", sa.Text),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("finished_at", sa.Double),
    )
    _index("ix_deliveries_due", "deliveries", "next_at", where=sa.text("state = 'pending'"))
    _index("ix_deliveries_dead", "deliveries", "owner", "id", where=sa.text("state = 'dead'"))
    _index("ix_deliveries_finished", "deliveries", "finished_at", where=_FINISHED)


def _index(name: str, table: str, *columns: str | sa.TextClause, where: sa.TextClause | None = None) -> None:
    op.create_index(name, table, list(columns), sqlite_where=where, postgresql_where=where)
