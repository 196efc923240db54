"""The databases of the jobs' tests, for keys."""

from tests.app.jobs.conftest import blank_file, blank_server, database, server, url

__all__ = ["blank_file", "blank_server", "database", "server", "url"]
