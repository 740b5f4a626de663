"""A recipe on an encoder-decoder, from pictures to answers: it learns eight scenes by heart, and answers them."""

import json

import mmjax
from mmjax import config
from mmjax.data import sources
from mmjax.jobs import plan, train

SCENES = config.Source(kind="digits", options={"task": "caption", "size": 8})
RECIPE = config.Recipe(
    name="t5",
    model=config.Model(
        llm=config.Part(
            config=dict(
                model_type="t5",
                d_model=64,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
            )
        ),
        vision=config.Part(
            config=dict(
                model_type="siglip_vision_model",
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                image_size=32,
                patch_size=16,
            )
        ),
        feature_layers=(-1,),
        image=config.Image(aspect="squash"),
        tokenizer=config.Tokenizer(vocab_size=300),
        template="v1",
        system="",
    ),
    stages={
        "all": config.Stage(
            trainable=("vision/layers/**", "vision/patch/**", "connector/**", "llm/**"),
            sources={"scenes": SCENES},
            steps=120,
            rows=8,
            length=64,
            answer_length=40,
            packing=False,
            tiles=1,
            optimizer=config.Optimizer(learning_rate=2e-3, clip_norm=1.0),
        )
    },
    run=("all",),
    evaluations={"scenes": config.Evaluation(source=SCENES, max_new_tokens=40, batch=8)},
    checkpoint=config.Checkpoint(every=0),
    logging=config.Logging(every=20, tensorboard=False),
)


def test_it_learns_and_answers(one_device, tmp_path):
    train.run(RECIPE, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["accuracy"] >= 0.9  # the question is the same everywhere: only the picture tells the scenes apart
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.05 < lines[0]["loss"] and 0 < lines[-1]["padding"] < 1
    assert (tmp_path / "first_batch_all.png").stat().st_size > 0
    dataset = sources.open(SCENES)
    asked = [{"type": "image", "image": dataset.image("train-000003.png")}, {"type": "text", "text": "Describe the digits."}]
    assert mmjax.load(tmp_path).chat([{"role": "user", "content": asked}], 40) == dataset[3].answers[0]


def test_it_is_planned(tmp_path):
    plan.run(RECIPE, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["flops_per_sample_all"] > 1e6
