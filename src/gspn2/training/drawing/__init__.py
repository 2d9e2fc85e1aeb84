"""GSPN-2 beside self-attention in small models that learn to draw digits: UNet, DiT and a distilled UNet.

    from gspn2.training.drawing import Settings, draw, plan

    draw(plan(models=("unet-attention", "unet-gspn2"), seeds=(0,)), Settings(steps=2000), Path("draw"))

Models of a kind have as many parameters and see the same pictures and noise. Each run leaves a JSON file and
grids of samples; one that is there is not run again, one that was stopped goes on from its checkpoint.
"""

from ..series import Progress
from .judge import Judge, frechet
from .plan import DRAWERS, Run, Settings, plan
from .runner import draw, prepare

__all__ = ["DRAWERS", "Judge", "Progress", "Run", "Settings", "draw", "frechet", "plan", "prepare"]
