import json

import pytest

from mmjax.errors import UserError
from mmjax.published import locate, open_published


def test_a_directory_near_another_is_found(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    assert locate("../base", tmp_path / "adapter") == (tmp_path / "base").resolve()
    with pytest.raises(UserError, match="/nowhere/at/all: no such directory"):
        locate("/nowhere/at/all")


def test_the_family_comes_from_the_config_not_from_the_name(tmp_path):
    directory = tmp_path / "llava-lora-mistral"
    directory.mkdir()
    fields = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    (directory / "config.json").write_text(json.dumps(fields))
    assert open_published(directory).family.model_types == ("llama",)


def test_a_damaged_config_is_said(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        open_published(tmp_path)
