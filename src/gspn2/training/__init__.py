"""Training and evaluation of image classifiers, from Python.

    from gspn2.training import TrainConfig, evaluate, load_checkpoint, load_data, eval_loader, train

    config = TrainConfig(data="digits", model="test_gspn2", epochs=20, out="runs/digits")
    result = train(config, on_event=print)        # checkpoints, log and summary are in runs/digits
    result.history[-1].top1                       # percent; also train_loss, test_loss, top5, lr, step, epoch

    model, info = load_checkpoint(result.best)    # or the folder; in evaluation mode
    data = load_data(info.config)                 # data.train, data.test: image sets; data.class_names
    evaluation = evaluate(model, eval_loader(data.test))
    evaluation.top1, evaluation.confusion         # percent; (classes, classes) counts, rows: true class

    image = data.test.image(0)                    # PIL image as it was stored
    logits = model(info.preprocess(image)[None])  # (1, classes), in the order of info.class_names

`config` takes any model that timm knows. What a user can put right is raised as `UserError` (a ValueError)
with a message of one line.

Needs the extra `gspn2[train]`.
"""

from .batches import eval_loader
from .checkpoint import BEST, LAST, CheckpointInfo, load_checkpoint
from .config import TrainConfig
from .data import Data, load_data, load_test_data
from .engine import TrainResult, train
from .errors import CheckpointError, DataError, Interrupted, TrainingFailed, UserError
from .evaluate import Evaluation, evaluate
from .events import EpochDone, EvalProgress, Event, Notice, OnEvent, RunStarted, StepDone
from .image_sets import ImageSet, StreamSet
from .log import EpochRow, read_history
from .model import build_model
from .recipes import RECIPES, Recipe, recipe_settings
from .transforms import Preprocess, open_image

__all__ = [
    "BEST",
    "LAST",
    "RECIPES",
    "CheckpointError",
    "CheckpointInfo",
    "Data",
    "DataError",
    "EpochDone",
    "EpochRow",
    "EvalProgress",
    "Evaluation",
    "Event",
    "ImageSet",
    "Interrupted",
    "Notice",
    "OnEvent",
    "Preprocess",
    "Recipe",
    "RunStarted",
    "StepDone",
    "StreamSet",
    "TrainConfig",
    "TrainResult",
    "TrainingFailed",
    "UserError",
    "build_model",
    "eval_loader",
    "evaluate",
    "load_checkpoint",
    "load_data",
    "load_test_data",
    "open_image",
    "read_history",
    "recipe_settings",
    "train",
]
