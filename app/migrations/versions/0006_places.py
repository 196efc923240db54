"""Which database this is, to the stores that its pictures are kept in."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table("places", sa.Column("id", sa.String(32), primary_key=True))
