"""Webhooks: what is signed, what is to be delivered, and who delivers it."""
