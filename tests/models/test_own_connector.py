"""A connector of one's own is one file, and one config that names it: nothing else is touched."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

import mmjax
from mmjax.config import from_config_dict
from mmjax.errors import UserError
from mmjax.jobs import train
from tests.configs import expand
from tests.configs.overfit import by_heart

FILE = '''"""The mean of every row of the picture's map, through one Linear."""

import math

import jax
import jax.numpy as jnp

from mmjax.models.layers import Linear, apply


def tokens(config):
    return math.isqrt(config.positions)


def init(key, config):
    return {"rows": {"kernel": jax.random.normal(key, (config.in_width, config.out_width)) * config.in_width**-0.5}}


def connect(params, config, features, adapters, run):
    side = tokens(config)
    rows = features.reshape(*features.shape[:-2], side, side, config.in_width).mean(-2)
    return apply(Linear(config.out_width, False, adapters), params["rows"], rows)
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "row_means.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "row_means"
    sys.modules.pop("row_means", None)


def recipe(kind: str):
    values = expand.config("llava15", "lora,tiny").to_dict()
    values["model"]["connector"]["kind"] = kind
    small = by_heart(from_config_dict(values))
    stages = {name: dataclasses.replace(stage, rows=8, steps=2) for name, stage in small.stages.items()}
    return dataclasses.replace(small, stages=stages)


def test_it_trains_is_saved_and_read_back(module, one_device, tmp_path):
    chosen = recipe(module)
    train.run(chosen, tmp_path / "work")
    assert "connector/rows/kernel" in (tmp_path / "work" / "sharding.txt").read_text()
    model = mmjax.load(tmp_path / "work")
    assert model.config.tokens_per_tile == 6  # of 6 x 6 patches
    model.save_pretrained(tmp_path / "saved")
    again = mmjax.load(tmp_path / "saved")
    picture = np.random.default_rng(0).integers(0, 255, (84, 84, 3)).astype(np.uint8)
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Which digit?"}]}]
    assert again.chat(messages, max_new_tokens=4) == model.chat(messages, max_new_tokens=4)

    sys.modules.pop(module)  # a directory alone makes no code run
    with pytest.raises(UserError, match="'row_means' is no kind of connector.*import it first"):
        mmjax.load(tmp_path / "saved")


def test_what_is_no_connector_is_told(module, tmp_path):
    with pytest.raises(UserError, match="'space_to_deph'; it must be one of .* Did you mean 'space_to_depth'?"):
        recipe("space_to_deph")
    (tmp_path / "row_means.py").write_text("def tokens(config): return 1")
    with pytest.raises(UserError, match="the module 'row_means' has no function init"):
        recipe(module)

