"""GSPN-2 in the UNets of diffusers (SDXL, SD-1.5 and alike); needs the extra `gspn2[diffusers]`.

from diffusers import StableDiffusionXLPipeline
from gspn2.integrations.diffusers import UNetMixers, mount, unmount

pipe = StableDiffusionXLPipeline.from_pretrained(folder)
mixers = mount(pipe.unet)                                  # fresh mixers, for training
mixers.save_pretrained("mixers")

mount(pipe.unet, UNetMixers.from_pretrained("mixers"))     # trained ones, on another day
pipe("a lighthouse at dusk")
unmount(pipe.unet)                                         # the UNet as it was
"""

try:
    import diffusers  # noqa: F401
except ModuleNotFoundError as error:
    # The name stays that of what is missing: for those who ask, the command among them.
    hint = f'gspn2.integrations.diffusers needs {error.name}: pip install "gspn2[diffusers]"'
    raise ModuleNotFoundError(hint, name=error.name) from error

from .mixers import AttentionMixer, UNetMixers
from .mounting import is_mounted, mixers_of, mount, unmount

__all__ = ["AttentionMixer", "UNetMixers", "is_mounted", "mixers_of", "mount", "unmount"]
