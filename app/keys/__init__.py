"""API keys: what they look like, where they are kept, whom they stand for, and how much each may have."""
