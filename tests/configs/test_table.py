"""The README's gallery of recipes is what the recipes say."""

from tests.configs import table


def test_the_readme_has_the_gallery_of_the_recipes():
    text = table.README.read_text()
    assert table.written(text) == text, "run `python -m tests.configs.table`"
