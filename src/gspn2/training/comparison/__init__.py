"""GSPN-2 beside a ViT and a ConvNet of equal parameters, on tasks that are a matter of global context.

    from gspn2.training.comparison import Settings, compare, plan

    runs = plan(tasks=("pathfinder",), sizes=(64,), seeds=(0, 1, 2))
    compare(runs, Settings(steps=5000), Path("learn"), on_event=print)  # learn/maze-64-vit-s0.json, ...

All contenders see the same images in the same order, with the same optimizer and schedule. Each run leaves a
JSON file; one that is there is not run again, one that was stopped goes on from its checkpoint.
"""

from ..series import Progress
from .contenders import CONTENDERS, MAIN, Contender, build
from .plan import Run, Settings, plan
from .runner import compare

__all__ = [
    "CONTENDERS",
    "MAIN",
    "Contender",
    "Progress",
    "Run",
    "Settings",
    "build",
    "compare",
    "plan",
]
