"""Webhooks: what their bodies say, how they are signed, and who delivers them."""
