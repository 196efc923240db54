"""Finished generations: receipts, the pictures behind them, and how long they are kept."""
