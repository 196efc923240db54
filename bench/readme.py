"""Where measured tables are published: bench/README.md, each between two marks of its own."""

from pathlib import Path

README = Path(__file__).with_name("README.md")


def publish(table: str, text: str, readme: Path = README) -> None:
    """Replaces what stands between the marks of this table. Raises ValueError where they are missing."""
    begin, end = f"<!-- {table}: begin -->", f"<!-- {table}: end -->"
    before, found, rest = readme.read_text().partition(begin)
    _, also_found, after = rest.partition(end)
    if not found or not also_found:
        raise ValueError(f"{readme} has no marks for the table {table!r}")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")
