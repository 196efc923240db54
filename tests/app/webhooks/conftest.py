"""The databases of the jobs' tests, for webhooks."""

from tests.app.jobs.conftest import blank_file, blank_server, database, outbox, server, store, url

__all__ = ["blank_file", "blank_server", "database", "outbox", "server", "store", "url"]
