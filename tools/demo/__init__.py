"""The tiny world that is bundled with cdist: rendered scenes, questions about them, a teacher, a student's config.

Everything a newcomer needs to see a distillation without a download: `world.write_world` makes the data,
`TEACHER` is an ordinary Hugging Face directory trained on it by `train_teacher`, and `STUDENT` is the
configuration of a smaller language model that starts at random.
"""

from pathlib import Path

TEACHER = Path(__file__).parent / "teacher"
STUDENT = Path(__file__).parent / "student"
