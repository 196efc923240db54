"""Experiments: who draws with which arm, what came of it, and what that says. Sees neither Ray nor torch."""
