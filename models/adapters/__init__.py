"""What is put on a network per row: one module per kind, whose name is its registration."""
