"""The database's schema as a line of scripts, each of which brings it one step further."""
