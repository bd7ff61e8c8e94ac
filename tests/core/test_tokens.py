import pytest
import torch
from tiny import llava_processor, sample, samples

from compodistill.errors import DataError
from compodistill.tokens import BUCKET, IGNORE, collate, query_positions, tokenize

IMAGE = 1


@pytest.fixture(scope="module")
def processor():
    return llava_processor()


def supervised_text(processor, tokens):
    ids = tokens.labels[tokens.labels != IGNORE]
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("s", samples(), ids=lambda s: s.key)
def test_exactly_the_answers_and_their_end_tokens_are_supervised(processor, s):
    tokens = tokenize(processor, s, IMAGE)
    answers = [t.parts[0] for t in s.turns if t.role == "assistant"]
    assert supervised_text(processor, tokens) == "".join(f"{a}<|end|>" for a in answers)
    p = tokens.supervised_positions
    assert torch.equal(tokens.labels[p], tokens.input_ids[p])
    assert len(tokens.visual_positions) == 16 * len(s.images)


def test_position_before_a_first_answer_token_is_the_assistant_mark(processor):
    tokens = tokenize(processor, samples()[0], IMAGE)
    first = int(tokens.supervised_positions[0])
    assert processor.tokenizer.convert_ids_to_tokens(int(tokens.input_ids[first - 1])) == "<|assistant|>"


def test_user_text_that_looks_like_an_answer_is_not_supervised(processor):
    s = sample("k", ("user", "a cat"), ("assistant", "a cat"), ("user", "a cat"), ("assistant", "no"))
    assert supervised_text(processor, tokenize(processor, s, IMAGE)) == "a cat<|end|>no<|end|>"


def test_conversation_without_answer_is_refused_by_name(processor):
    with pytest.raises(DataError, match="no supervised token") as e:
        tokenize(processor, sample("lonely", ("user", "hello?")), IMAGE)
    assert "lonely" in str(e.value)


def test_sequence_over_max_length_is_refused_by_name(processor):
    with pytest.raises(DataError, match="--max-length 5"):
        tokenize(processor, samples()[0], IMAGE, max_length=5)


def test_digest_sees_every_field(processor):
    a = tokenize(processor, samples()[0], IMAGE).digest()
    b = tokenize(
        processor, sample("x", ("user", "<image>what is this!"), ("assistant", "a cat on a mat")), IMAGE
    ).digest()
    assert a["input_ids"] != b["input_ids"]
    assert a["visual_tokens"] == b["visual_tokens"] == 16


@pytest.mark.parametrize("rows", ["all", "visual", "text", "answer"])
def test_rows_partition_the_sequence_behind_the_first_visual_token(processor, rows):
    for s in samples():
        t = tokenize(processor, s, IMAGE)
        q = set(query_positions(t, rows).tolist())
        visual = set(t.visual_positions.tolist())
        after = set(range(min(visual), len(t.input_ids))) if visual else set()
        predicting = {p - 1 for p in t.supervised_positions.tolist()}
        expected = {"all": after, "visual": visual, "text": after - visual, "answer": after & predicting}[rows]
        assert q == expected


def test_batch_is_padded_to_a_bucket_whatever_its_neighbours(processor):
    tokens = [tokenize(processor, s, IMAGE) for s in samples()]
    batch = collate(tokens, pad_token_id=0)
    assert batch["input_ids"].shape[1] % BUCKET == 0
    assert batch["pixel_values"].shape[0] == sum(len(s.images) for s in samples())
    assert batch["attention_mask"].sum(1).tolist() == [len(t.input_ids) for t in tokens]


def test_batch_of_text_only_samples_has_no_pixels(processor):
    assert "pixel_values" not in collate([tokenize(processor, samples()[1], IMAGE)], pad_token_id=0)
