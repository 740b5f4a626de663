"""The README's gallery of recipes is what the recipes say, and what they are made of can be divided over devices."""

import math

from mmjax import config
from mmjax.architecture import model_config
from mmjax.parallel import sharding
from mmjax.parallel.mesh import make_mesh
from tests.configs import expand, table


def test_the_readme_has_the_gallery_of_the_recipes():
    text = table.README.read_text()
    assert table.written(text) == text, "run `python -m tests.configs.table`"


def test_no_large_leaf_is_whole_on_every_device():
    """At published size, of 16 MiB and more in bfloat16."""
    mesh = make_mesh(config.Mesh(data=1, fsdp=8))
    whole = []
    for name in expand.systems():
        recipe = config.from_config_dict(expand.config(name, ""))
        rows = sharding.table(table.shapes(model_config(recipe)), mesh)
        whole += [(name, row.path, row.shape) for row in rows if 2 * math.prod(row.shape) >= 2**24 and "fsdp" not in row.spec]
    assert not whole, "\n".join(map(str, whole))
