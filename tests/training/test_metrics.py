"""The journal goes back to a step; rates; the table."""

import types

import pytest

from mmjax.flops import Flops
from mmjax.training.metrics import Best, Clock, Journal, Speed, format_line, parameter_table
from mmjax.training.trainable import select
from tests.training import tiny


def test_a_journal_goes_back_to_a_step_and_drops_what_a_kill_cut_short(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    for stage, step in [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("c", 1)]:
        journal.write(stage, step, {"loss": 0.5})
    with journal.path.open("a") as file:
        file.write('{"stage": "c", "st')
    journal.rewind(("a", "b", "c"), "b", 1)
    assert [(line["stage"], line["step"]) for line in journal.read()] == [("a", 1), ("a", 2), ("b", 1)]
    journal.rewind(("b", "c"), "b", -1)  # a stage of another run stays
    assert [(line["stage"], line["step"]) for line in journal.read()] == [("a", 1), ("a", 2)]
    journal.write("a", 3, {"loss": float("nan")})
    assert journal.read()[-1] == {"stage": "a", "step": 3, "loss": None}


def _info(tokens: int):
    return types.SimpleNamespace(tokens=tokens, samples=2, padding=0.25, supervised=10, images=1, tiles=1, answers=0, share=1.0)


def test_rates_are_of_the_steps_that_are_done():
    speed = Speed(Flops({}, {"llm": 6.0}, {}, {}), encoded=True, window=3)
    speed.count(_info(1000), 0.0)
    first = speed.read()  # with compilation, until there is a second step
    assert first["tokens_per_second"] > 0
    for _ in range(5):
        speed.count(_info(100), 0.0)
    values = speed.read()
    assert values["samples_per_second"] > 0 and values["padding"] == 0.25 and values["loader_wait"] == 0
    assert values["tokens_per_second"] / values["samples_per_second"] == pytest.approx(50)
    assert values["peak_memory"] > 2**20
    line = format_line("a", 5, 10, {"loss": 1.0, "gradient_norm": 2.0, "learning_rate": 1e-3, **values}, 61)
    assert "a 5/10  loss 1.0000" in line and line.endswith("1:01 left") and "MFU" in line


def test_the_table_counts_parts_and_what_is_trained():
    params = tiny.params()
    table = parameter_table(params, select(params, ("connector/**", "llm/**/lora_*"), "k"))
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    connector, adapters = 16 * 32 + 32 + 32 * 32 + 32, 2 * 4 * (32 + 32) + 2 * 4 * (32 + 64)
    assert rows["connector"][0] == rows["connector"][1] == f"{connector:,}"
    assert rows["adapters"][0] == f"{adapters:,}" and rows["vision"][1] == "0"
    assert rows["total"][1] == f"{connector + adapters:,}"


def test_the_best_loss_and_the_time_left():
    best = Best()
    for loss in (3.0, 1.0, 2.0, 1.5):
        best.see(loss)
    assert (best.last, best.loss, best.since) == (1.5, 1.0, 2)
    assert Clock(0, 10).left(10) == 0
