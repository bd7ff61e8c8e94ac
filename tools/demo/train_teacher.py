"""Trains the bundled teacher from nothing: `python -m compodistill.tools.demo.train_teacher --out DIR --seed 0`.

1. The vision tower alone learns what each cell holds, by auxiliary heads that are then thrown away. Without
   this the language model's loss has to invent shapes first, which takes most of the time.
2. The whole model learns to answer, by degrees: first where things are in scenes of one or two objects,
   then what stands beside what, then mostly composition in full scenes. Relations that are asked for
   directly, among three objects, are acquired late or never.

DIR becomes an ordinary Hugging Face directory (`LlavaForConditionalGeneration`), with `training_log.json`
beside the weights: settings, losses, and accuracies on held-out scenes as `cdist evaluate` measures them.
About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling

from compodistill.tools.demo.build import (
    END,
    ROLES,
    build_processor,
    build_tokenizer,
    generation_config,
    teacher_config,
    write_student,
)
from compodistill.tools.demo.drills import comparing, finding
from compodistill.tools.demo.questions import Question, without_picture
from compodistill.tools.demo.scenes import COLOURS, SHAPES, SIZES, Draws, Scene, draw_scenes, render
from compodistill.tools.demo.world import ask, write_world
from compodistill.tools.evaluate.scoring import evaluate
from compodistill.tools.evaluate.tasks import load_task


@dataclass(frozen=True)
class Stage:
    """A stretch of the curriculum.

    It lasts until the questions of `goal` are answered right (19 of 20), at most until this fraction of all
    steps. A conversation is one of the `drills`, or so many questions of each family (`turns`), whole or one
    question at a time. Scenes have one of these numbers of objects; a step takes `scale` times the usual number
    of them, short conversations leaving room for more.
    """

    until: float
    goal: str
    objects: tuple[int, ...]
    drills: tuple[Callable[[Scene, Draws], list[Question]], ...] = ()
    turns: dict[str, int] = field(default_factory=dict)
    scale: int = 1


CURRICULUM = (
    Stage(0.35, "locate", (1, 2, 3), (finding,), scale=4),
    Stage(0.60, "compare", (2, 3), (comparing, comparing, finding), scale=4),
    Stage(1.00, "", (3,), turns={"recognition": 2, "composition": 4, "localisation": 2}),
)
# Once relations hold, a second round from a high learning rate on what is still missing: what goes with what.
REVISION = (Stage(1.00, "", (3,), (finding, comparing), {"recognition": 3, "composition": 4}),)
TEACHER_SEED = 7_000  # apart from the small seeds people give to worlds


def messages(questions: list[Question], *, image: bool) -> list[dict]:
    """Chat messages of a conversation, the image at the head of the first."""
    out: list[dict] = []
    for i, question in enumerate(questions):
        parts = [{"type": "image"}] if image and i == 0 else []
        out.append({"role": "user", "content": [*parts, {"type": "text", "text": question.text}]})
        out.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    return out


def cell_labels(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    """What each cell holds, 0 for nothing: attribute -> (B, V) int64, and where it is (`row`, `column`)."""
    grid = scenes[0].grid
    labels = {a: torch.zeros(len(scenes), grid * grid, dtype=torch.long) for a in ("colour", "shape", "size")}
    values = {"colour": list(COLOURS), "shape": list(SHAPES), "size": list(SIZES)}
    for i, scene in enumerate(scenes):
        for t in scene.things:
            for attribute, names in values.items():
                labels[attribute][i, t.row * grid + t.column] = 1 + names.index(getattr(t, attribute))
    cells = torch.arange(grid * grid).expand(len(scenes), -1)
    return {**labels, "row": cells // grid, "column": cells % grid}


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, steps - warmup))))


def optimiser(
    parameters: list[nn.Parameter], lr: float, steps: int, warmup: int = 50
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    adam = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    return adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda s: cosine(s, steps, warmup))


def train_vision(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pixels: torch.Tensor,
    scenes: list[Scene],
    log: Callable[..., None],
    *,
    steps: int,
    seed: int,
    batch: int = 64,
) -> None:
    """Supervises vision tower and projector with the label of each cell.

    What a cell holds is read off against the language model's own (still random) word vectors, so that visual
    features come to speak its language, as those of a CLIP or SigLIP do; where it is, by a head that is thrown
    away. The word vectors rest. Scores are cosines at a fixed temperature and lengths are held near those of
    words: features that may grow without bound are told apart by these heads, but alike to attention.
    """
    labels = cell_labels(scenes)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    words = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}
    vectors = model.get_input_embeddings().weight.detach()
    length = vectors.norm(dim=-1).mean()
    heads = {}
    for attribute, names in words.items():
        ids = [tokenizer.encode(f" {name}") for name in ("nothing", *names)]
        assert all(len(i) == 1 for i in ids), "a word of the world is not one token"
        heads[attribute] = vectors[[i[0] for i in ids]]
    for line in ("row", "column"):
        heads[line] = nn.Parameter(0.1 * torch.randn(scenes[0].grid, vectors.shape[1]))
    trained = [*tower.parameters(), *projector.parameters(), heads["row"], heads["column"]]
    adam, schedule = optimiser(trained, 2e-3, steps)
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(scenes), (batch,), generator=order)
        features_BVD = projector(tower(pixels[rows], output_hidden_states=True).hidden_states[-1])
        losses, right = {}, {}
        for name, head in heads.items():
            cosines = F.normalize(features_BVD, dim=-1) @ F.normalize(head, dim=-1).T
            scores, target = (15 * cosines).flatten(0, 1), labels[name][rows].flatten()
            losses[name] = F.cross_entropy(scores, target)
            held = labels["colour"][rows].flatten() > 0  # accuracy only where there is something
            right[name] = (scores.argmax(-1) == target)[held].float().mean()
        losses["length"] = (features_BVD.norm(dim=-1) / length - 1).square().mean()
        loss = torch.stack(list(losses.values())).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % 100 == 99:
            accuracy = {name: round(r.item(), 4) for name, r in right.items()}
            log(phase="vision", step=step + 1, loss=round(loss.item(), 4), accuracy=accuracy)


class Conversations:
    """Batches of tokenized conversations about training scenes."""

    def __init__(self, processor: LlavaProcessor, scenes: list[Scene], seed: tuple[int, ...]) -> None:
        self.tokenizer = processor.tokenizer
        self.processor, self.scenes, self.seed = processor, scenes, seed
        self.visual = processor.image_token * scenes[0].grid ** 2
        self.rows: dict[int, list[int]] = {}  # number of objects -> scenes
        for i, scene in enumerate(scenes):
            self.rows.setdefault(len(scene.things), []).append(i)

    def batch(self, step: int, size: int, stage: Stage) -> tuple[list[int], list[str], dict[str, torch.Tensor]]:
        """Scene of each conversation, kinds of the questions in order, and ids, mask, labels (B, T).

        `size` scenes; the last conversation of a batch is about none and has no index.
        """
        draws = Draws(*self.seed, step)
        rows, asked = [], []
        apart = draws.coin()
        for _ in range(size * stage.scale):
            row = draws.pick(self.rows[draws.pick(stage.objects)])
            scene = self.scenes[row]
            if stage.drills and not (stage.turns and draws.coin()):
                parts = [draws.pick(stage.drills)(scene, draws)]
            else:
                questions = ask(scene, draws, stage.turns)
                parts = [[q] for q in questions] if apart else [questions]
            rows += [row] * len(parts)
            asked += parts
        asked.append([without_picture(draws)])
        texts = []
        for i, questions in enumerate(asked):
            chat = self.processor.apply_chat_template(messages(questions, image=i < len(rows)))
            texts.append(chat.replace(self.processor.image_token, self.visual))
        batch = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        labels = answers_only(ids, *self.tokenizer.convert_tokens_to_ids([ROLES["assistant"], END]))
        kinds = [question.kind for questions in asked for question in questions]
        return rows, kinds, {"input_ids": ids, "attention_mask": mask, "labels": labels}


def answers_only(ids: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Labels (B, T): the tokens after each `begin` up to and with the next `end`, -100 elsewhere."""
    labels = torch.full_like(ids, -100)
    inside = torch.zeros(len(ids), dtype=torch.bool)
    for t in range(ids.shape[1]):
        labels[inside, t] = ids[inside, t]
        inside = (inside & (ids[:, t] != end)) | (ids[:, t] == begin)
    return labels


@torch.no_grad()
def start_by_matching(model: LlavaForConditionalGeneration) -> None:
    """Let the decoder start as one that looks for what is alike and says what it finds.

    In one head of each group queries equal keys, so that like attends to like; every head hands on what it finds
    unchanged but for length; the head that speaks starts as the word vectors. With random projections nothing in a
    model so small leads from "red" to what is red, and plateaus of a thousand steps pass before it is found
    (mimetic initialisation, Trockman and Kolter, 2023, arXiv 2305.09828).
    """
    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        keys = attention.k_proj.weight.unflatten(0, (-1, attention.head_dim))
        values = attention.v_proj.weight.unflatten(0, (-1, attention.head_dim))
        queries = attention.q_proj.weight.unflatten(0, (-1, attention.head_dim)).unflatten(0, (len(keys), -1))
        queries[:, 0] = keys
        outputs = attention.o_proj.weight.unflatten(1, (len(values), -1, attention.head_dim))  # (D, groups, heads, E)
        outputs.copy_(values.permute(2, 0, 1)[:, :, None].expand_as(outputs))
    model.lm_head.weight.copy_(model.get_input_embeddings().weight)


def train_language(
    model: LlavaForConditionalGeneration,
    features: torch.Tensor,
    data: Conversations,
    log: Callable[..., None],
    *,
    steps: int,
    lr: float,
    batch: int,
    curriculum: Sequence[Stage] = CURRICULUM,
    first: int = 0,
) -> None:
    """Trains projector and language model on the answers, along the curriculum.

    Args:
        first: number of the first step, which decides what is drawn.
        features: (scenes, V, D) what the vision tower gives for each scene. The tower rests: the first, wild
            gradients through a random language model would undo what it has learnt.
    """
    body, assistant = model.model, data.tokenizer.convert_tokens_to_ids(ROLES["assistant"])
    parameters = [p for n, p in model.named_parameters() if "vision_tower" not in n]
    adam, schedule = optimiser(parameters, lr, steps, warmup=100)
    started, losses = time.process_time(), list[float]()
    marks: dict[str, list[bool]] = {}
    stages = iter(curriculum)
    stage = next(stages)
    for step in range(steps):
        rows, kinds, inputs = data.batch(first + step, batch, stage)
        visual_BVD = body.multi_modal_projector(features[rows])
        images = {"image": BaseModelOutputWithPooling(pooler_output=list(visual_BVD))}
        labels = inputs.pop("labels")[:, 1:]
        hidden = body(**inputs, mm_encoder_outputs=images).last_hidden_state[:, :-1]
        supervised = labels != -100  # the head only where there is something to learn
        logits, target = model.lm_head(hidden[supervised]), labels[supervised]
        loss = F.cross_entropy(logits, target)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
        losses.append(loss.item())
        # a question counts as answered when all its tokens are right
        number = (inputs["input_ids"][:, :-1] == assistant)[supervised].cumsum(0) - 1
        wrong = torch.zeros(len(kinds)).index_add_(0, number, (logits.argmax(-1) != target).float())
        for kind, errors in zip(kinds, wrong.tolist(), strict=True):
            marks.setdefault(kind, []).append(errors == 0)
        if step % 50 == 49:
            accuracy = {kind: round(float(np.mean(m)), 3) for kind, m in sorted(marks.items())}
            log(
                phase="language",
                stage=curriculum.index(stage),
                step=first + step + 1,
                loss=round(float(np.mean(losses)), 4),
                accuracy=accuracy,
                cpu_seconds=round(time.process_time() - started, 1),
            )
            losses, marks = [], {}
            if step + 1 >= stage.until * steps or accuracy.get(stage.goal, 0) > 0.95:
                stage = next(stages, stage)


@torch.inference_mode()
def encode(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """(scenes, V, D) features as the projector takes them."""
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    return torch.cat([tower(p, output_hidden_states=True).hidden_states[layer] for p in pixels.split(500)])


def held_out(model: LlavaForConditionalGeneration, processor: LlavaProcessor, world: Path) -> dict:
    """Accuracies on the held-out questions of a folder, by the same code as `cdist evaluate`."""
    tasks = [load_task(path) for path in sorted(world.glob("*.json"))]
    return {task.name: evaluate(model, processor, task, batch_size=64).summary() for task in tasks}


def brief(results: dict) -> dict:
    """Of a summary only the accuracies."""
    return {
        task: {"all": round(r["accuracy"], 3), **{k: round(v["accuracy"], 3) for k, v in r["kinds"].items()}}
        for task, r in results.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the teacher's directory")
    parser.add_argument("--student", type=Path, help="also write the student's configuration here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=12_000, help="training scenes")
    parser.add_argument("--vision-steps", type=int, default=700)
    parser.add_argument("--steps", type=int, default=3_200)
    parser.add_argument("--revision", type=int, default=1_300, help="steps of the second round")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=12, help="scenes a step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    entries: list[dict] = []

    def log(**entry: object) -> None:
        entries.append(entry)
        print(json.dumps(entry), flush=True)

    started, cpu = time.time(), time.process_time()
    seed = (TEACHER_SEED, args.seed)
    scenes = list(islice(draw_scenes("train", *seed, 3), args.scenes))
    for n in (1, 2):  # simpler ones for the curriculum; there are few different scenes of one object
        scenes += islice(draw_scenes("train", *seed, n, n_objects=n), {1: 500, 2: args.scenes // 4}[n])
    draws = Draws(*seed, 1)
    words = [q.text + " " + q.answer for s in scenes[:4000] for q in ask(s, draws)]
    words += [q.text + " " + q.answer for s in scenes[:500] for q in comparing(s, draws)]
    words += [without_picture(draws).text for _ in range(500)]
    processor = build_processor(build_tokenizer(words))
    pixels = processor.image_processor([render(s) for s in scenes], return_tensors="pt")["pixel_values"]
    model = LlavaForConditionalGeneration(teacher_config(processor.tokenizer))
    model.get_input_embeddings().weight.data.mul_(4.0)  # or the first layers drown a token's own identity
    model.generation_config = generation_config(processor.tokenizer)
    log(
        phase="start",
        scenes=len(scenes),
        parameters=sum(p.numel() for p in model.parameters()),
        cpu_seconds=round(time.process_time() - cpu, 1),
    )

    train_vision(model, processor.tokenizer, pixels, scenes, log, steps=args.vision_steps, seed=args.seed)
    start_by_matching(model)
    data = Conversations(processor, scenes, (*seed, 2))
    features = encode(model, pixels).clone()
    train_language(model, features, data, log, steps=args.steps, lr=args.lr, batch=args.batch)
    train_language(
        *(model, features, data, log),
        **{"steps": args.revision, "lr": args.lr, "batch": args.batch, "curriculum": REVISION, "first": args.steps},
    )
    minutes = {"wall": round((time.time() - started) / 60, 2), "cpu": round((time.process_time() - cpu) / 60, 2)}

    model.eval()
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    with TemporaryDirectory() as world:
        write_world(world, 0, 200, TEACHER_SEED + args.seed)
        results = held_out(model, processor, Path(world) / "eval")
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "student")}
    report = {"settings": settings, "minutes": minutes, "held_out": results, "steps": entries}
    (args.out / "training_log.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"minutes": minutes, "held_out": brief(results)}, indent=1))
    if args.student:
        write_student(args.student, processor.tokenizer)


if __name__ == "__main__":
    main()
