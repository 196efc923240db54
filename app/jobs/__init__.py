"""Durable jobs: a promise to make pictures that is kept whichever process dies. docs/jobs.md tells the whole."""
