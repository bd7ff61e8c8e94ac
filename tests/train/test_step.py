"""A step from the store equals a step with the teacher in memory; logits and labels are causally shifted."""

from types import SimpleNamespace

import pytest
import torch
from tiny import llava, llava_processor, samples, save_llava, text_config
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from compodistill.attention import use_tappable_attention
from compodistill.errors import MismatchError
from compodistill.groups import layer_groups, understanding_layers
from compodistill.models import load_model
from compodistill.precompute.run import PassOptions, precompute
from compodistill.shards import index_shard
from compodistill.store.reader import open_store
from compodistill.tokens import IGNORE, collate, tokenize
from compodistill.train.join import Collator, JoinedDataset, to_targets
from compodistill.train.recipes import Losses, Stage
from compodistill.train.step import Matching, Targets, match, step_losses
from compodistill.train.student import Student

STUDENT_LAYERS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory, shard_of):
    """Teacher directory, shard, student language model directory."""
    root = tmp_path_factory.mktemp("world")
    LlamaForCausalLM(text_config(STUDENT_LAYERS, 16)).save_pretrained(root / "llm")
    return SimpleNamespace(
        root=root,
        teacher=save_llava(root / "teacher"),
        shard=shard_of(samples(), root / "shard.tar"),
        llm=root / "llm",
    )


def online_losses(teacher_dir, student, tokens, stage):
    """The paper's losses written plainly, the teacher in memory, eager attention, full logits."""
    teacher = llava().eval()
    teacher.load_state_dict(load_model(teacher_dir).model.state_dict())
    inputs = collate(tokens, 0)
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        t = teacher(**inputs, output_attentions=True, use_cache=False)
    s = student(**inputs, output_attentions=True, use_cache=False)
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    for b, x in enumerate(tokens):
        labels[b, : len(x.labels)] = x.labels
    shifted = labels[:, 1:] != IGNORE
    s_logits, t_logits = s.logits[:, :-1][shifted], t.logits[:, :-1][shifted]
    lm = F.cross_entropy(s_logits, labels[:, 1:][shifted])
    kl = F.kl_div(s_logits.log_softmax(-1), t_logits.log_softmax(-1), log_target=True, reduction="batchmean")
    layers = list(understanding_layers(STUDENT_LAYERS))
    groups = layer_groups(understanding_layers(8), len(layers))
    per_sample = []
    for b, x in enumerate(tokens):
        v = x.visual_positions
        if len(v) == 0:
            continue
        rows = torch.arange(int(v[0]), len(x.input_ids))
        cosines = []
        for layer, (first, last) in zip(layers, groups, strict=True):
            target = torch.stack([t.attentions[i][b].mean(0) for i in range(first, last + 1)]).mean(0)
            ours = s.attentions[layer][b].mean(0)
            cosines.append(F.cosine_similarity(target[rows][:, v], ours[rows][:, v], dim=-1))
        per_sample.append(torch.stack(cosines).mean())
    terms = {"lm": lm, "kl": kl, "attention": 1 - torch.stack(per_sample).mean()}
    return {**terms, "total": sum(getattr(stage.losses, n) * x for n, x in terms.items())}


@pytest.mark.parametrize("per_layer", [False, True], ids=["grouped", "per-layer"])
@pytest.mark.parametrize("adapter", ["fetched", "own"])
def test_dft_step_from_a_lossless_store_equals_the_step_with_the_teacher_in_memory(world, tmp_path, per_layer, adapter):
    vocabulary = text_config().vocab_size
    options = PassOptions(None if per_layer else STUDENT_LAYERS, "all", vocabulary, "lossless", batch_size=2)
    precompute([world.shard], world.teacher, str(tmp_path / "store"), options)
    store = open_store(tmp_path / "store")
    stage = Stage(train=["adapter", "llm"], losses=Losses(lm=1.0, kl=0.7, attention=1.3))
    students = [Student.from_store(store, world.llm, adapter=adapter, seed=3) for _ in range(2)]
    dataset = JoinedDataset(store, [world.shard], llava_processor(), 1)
    joined = [dataset[i] for i in range(len(dataset))]
    batch = Collator(0, {"logits", "attention"})(joined)
    matching = match(STUDENT_LAYERS, store.info.spec.groups, per_layer)
    offline = step_losses(
        students[0], students[0], batch["inputs"], to_targets(batch, torch.device("cpu")), stage, matching
    )
    online = online_losses(world.teacher, students[1], [j.tokens for j in joined], stage)
    assert offline.keys() == online.keys()
    for name in offline:
        torch.testing.assert_close(offline[name], online[name], rtol=1e-5, atol=1e-6)
    offline["total"].backward()
    online["total"].backward()
    for (name, a), (_, b) in zip(students[0].named_parameters(), students[1].named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            scale = b.grad.abs().max().clamp_min(1e-3)
            assert float((a.grad - b.grad).abs().max() / scale) < 1e-5, name


@pytest.fixture(scope="module")
def batch_and_model():
    processor = llava_processor()
    tokens = [tokenize(processor, s, 1) for s in samples()]
    model = llava(layers=4)
    use_tappable_attention(model)
    return tokens, model


def lm_loss(tokens, model, shift):
    supervised = [t.supervised_positions for t in tokens]
    targets = Targets(
        positions=[p - shift for p in supervised],
        labels_A=torch.cat([t.labels[p] for t, p in zip(tokens, supervised, strict=True)]),
    )
    stage = Stage(train=["llm"], losses=Losses(lm=1.0))
    return step_losses(model, model, collate(tokens, 0), targets, stage, Matching([], []))["lm"]


def test_language_model_loss_equals_transformers_own_shifted_loss(batch_and_model):
    tokens, model = batch_and_model
    inputs = collate(tokens, 0)
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    for b, t in enumerate(tokens):
        labels[b, : len(t.labels)] = t.labels
    expected = model(**inputs, labels=labels).loss
    torch.testing.assert_close(lm_loss(tokens, model, 1), expected, rtol=1e-5, atol=1e-6)
    for off_by_one in (0, 2):
        assert abs(float((lm_loss(tokens, model, off_by_one) - expected).detach())) > 1e-3


def test_stored_logits_are_the_predictions_of_the_supervised_tokens(world, tmp_path):
    precompute([world.shard], world.teacher, str(tmp_path / "store"), PassOptions(codec="lossless", top_k=5))
    store = open_store(tmp_path / "store")
    teacher = load_model(world.teacher)
    for s in samples():
        t = tokenize(teacher.processor, s, 1)
        with torch.no_grad():
            full = teacher.model(**collate([t], 0)).logits[0].log_softmax(-1)
        logits = store[s.key].logits
        for a, p in enumerate(t.supervised_positions.tolist()):
            here = torch.from_numpy(logits.ids[a]).long()
            torch.testing.assert_close(torch.from_numpy(logits.logprobs[a]), full[p - 1][here], rtol=1e-4, atol=1e-4)
            for wrong in (p, p - 2):
                if wrong < len(t.input_ids):
                    assert float((torch.from_numpy(logits.logprobs[a]) - full[wrong][here]).abs().max()) > 1e-2


def test_store_grouped_for_another_depth_is_refused_with_the_command_that_helps():
    with pytest.raises(MismatchError, match="--student-layers 8"):
        match(8, [(2, 4), (3, 5)], per_layer=False)


def test_shard_the_store_does_not_know_is_refused(world, tmp_path, shard_of):
    precompute([world.shard], world.teacher, str(tmp_path / "store"), PassOptions(top_k=4))
    other = shard_of(samples()[:2], tmp_path / "other.tar")
    with pytest.raises(MismatchError, match="no signals for this shard"):
        JoinedDataset(open_store(tmp_path / "store"), [other], llava_processor(), 1)
    assert len(index_shard(other)) == 2


def test_processor_that_tokenizes_differently_is_refused_by_field(world, tmp_path):
    precompute([world.shard], world.teacher, str(tmp_path / "store"), PassOptions(top_k=4))
    processor = llava_processor()
    processor.chat_template = processor.chat_template.replace("<|end|>", "<|end|> ", 1)
    dataset = JoinedDataset(open_store(tmp_path / "store"), [world.shard], processor, 1)
    with pytest.raises(MismatchError, match="input_ids differ"):
        dataset[0]
