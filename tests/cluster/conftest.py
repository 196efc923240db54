"""What tests of the cluster share: a real S3 server, the one of the stores' tests."""

from tests.app.stores.conftest import moto, rclone  # noqa: F401  fixtures
