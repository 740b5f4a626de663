"""The README's table of families is the registry's, and says of every family how it is tested."""

from tests.families import table


def test_the_readme_has_the_table_of_the_registry():
    text = table.README.read_text()
    assert table.written(text) == text, "run `python -m tests.families.table`"


def test_every_family_is_in_a_test():
    for name, (_, types) in table.CHECKS.items():
        source = (table.README.parent / "tests").rglob(f"{name}.py")
        assert types and next(source, None) is not None, name
