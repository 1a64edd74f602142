"""The tasks of pre-training by their names in the recipe (`training.recipe.TASK_NAMES`): a file and a line each."""

from training.data.tasks.ask import Ask
from training.data.tasks.base import Row, Task, View
from training.data.tasks.caption import Caption
from training.data.tasks.contrast import Contrast
from training.data.tasks.denoise import Denoise, ImageDenoise
from training.data.tasks.draw import Draw
from training.data.tasks.inpaint import Inpaint
from training.data.tasks.match import Match
from training.data.tasks.writing import Language, Poem, Review

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (Caption, Ask, Match, Contrast, Draw, Inpaint, ImageDenoise, Denoise, Language, Poem, Review)
}

__all__ = ["TASKS", "Row", "Task", "View"]
