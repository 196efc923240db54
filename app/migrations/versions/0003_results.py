"""Results: receipts, and where the pictures are."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "results",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.String(64)),
        sa.Column("receipt", sa.JSON, nullable=False),
        sa.Column("images", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
    )
    op.create_index("ix_results_expires_at", "results", ["expires_at"])
    op.create_index("ix_results_fingerprint", "results", ["owner", "fingerprint", "created_at"])
