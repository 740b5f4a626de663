import pytest

from mmjax.data.messages import BadSample, from_llava, from_messages, images, question, text, validated


def turns(*pairs):
    return [{"from": who, "value": value} for who, value in pairs]


def test_llava_conversations_become_messages():
    row = {
        "id": 7,
        "image": "a.jpg",
        "model": "x",
        "bbox": [1, 2],
        "conversations": turns(("human", "What is this?\n<image>"), ("gpt", "A cat.")),
    }
    sample = from_llava(row, "file:1")
    assert sample.id == "7"
    assert sample.messages == [
        {
            "role": "user",
            "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "\nWhat is this?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    assert text(sample.messages[0]) == "\nWhat is this?"
    assert question(sample.messages) == sample.messages[:1]
    assert sample.answers == ("A cat.",)


def test_a_first_turn_by_the_model_is_skipped_and_a_missing_id_is_the_row():
    row = {"conversations": turns(("gpt", "Hello"), ("human", "Hi"), ("gpt", "Yes"))}
    sample = from_llava(row, "data.json:4")
    assert sample.id == "data.json:4"
    assert [text(message) for message in sample.messages] == ["Hi", "Yes"]


def test_several_images_of_a_turn_keep_their_places():
    row = {
        "id": "x",
        "image": ["a.jpg", "b.jpg"],
        "conversations": turns(("human", "From <image> to <image>?"), ("gpt", "Far.")),
    }
    content = from_llava(row, "").messages[0]["content"]
    assert [part.get("path", part.get("text")) for part in content] == ["From ", "a.jpg", " to ", "b.jpg", "?"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.jpg", "conversations": turns(("human", "Hi"), ("gpt", "Yes"))}, "0 <image> placeholders but 1"),
        ({"conversations": turns(("human", "<image>\nHi"), ("gpt", "Yes"))}, "1 <image> placeholders but 0"),
        ({"image": ["a"], "conversations": turns(("human", "<image><image>"), ("gpt", "Yes"))}, "2 <image>"),
        ({"conversations": turns(("robot", "Hi"))}, "'robot'"),
        ({"conversations": turns(("human", "a"), ("human", "b"))}, "roles must alternate"),
        ({"conversations": [{"from": "human"}]}, "no text"),
        ({"conversations": "hello"}, "not a list of turns"),
        ({"conversations": []}, "at least one message"),
        ({"image": [3], "conversations": turns(("human", "<image>"))}, "something else than its name"),
    ],
)
def test_a_bad_llava_row_is_refused_by_id(row, reason):
    with pytest.raises(BadSample, match="sample odd-one: ") as caught:
        from_llava({"id": "odd-one", **row}, "")
    assert reason in caught.value.reason


def test_messages_rows_take_paths_lists_and_placeholders():
    inline = {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]}
    reply = {"role": "assistant", "content": "A cat."}
    sample = from_messages({"id": "m", "messages": [inline, reply], "kind": "what", "answers": ["A cat.", 3]}, "")
    assert (sample.kind, sample.answers) == ("what", ("A cat.", "3"))
    assert from_messages({"messages": [inline, reply], "answers": 7}, "").answers == ("7",)
    listed = {"messages": [{"role": "user", "content": "<image>What?"}, reply], "images": ["a.png"]}
    assert from_messages(listed, "").messages == sample.messages
    bare = {
        "messages": [{"role": "user", "content": [{"type": "image"}, inline["content"][1]]}, reply],
        "image": "a.png",
    }
    assert from_messages(bare, "").messages == sample.messages


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "not a list"),
        ([{"role": "tool", "content": ""}], "'tool'"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "only the first"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "'audio'"),
        ([{"role": "user", "content": [{"type": "image", "url": "http://x"}]}], "nothing is fetched"),
        ([{"role": "user", "content": 3}], "neither text nor a list"),
        ([{"role": "user", "content": "see <image>"}], "1 <image> placeholders but 0 images"),
    ],
)
def test_bad_messages_are_refused(messages, reason):
    with pytest.raises(BadSample) as caught:
        validated(messages, "m-1")
    assert caught.value.id == "m-1" and reason in caught.value.reason


def test_images_come_in_the_order_of_the_text():
    messages = [
        {"role": "user", "content": "<image> and"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "image", "path": "inline.png"}, {"type": "text", "text": "<image>"}]},
    ]
    found = images(validated(messages, "m", ["first.png", "last.png"]))
    assert [part["path"] for part in found] == ["first.png", "inline.png", "last.png"]
