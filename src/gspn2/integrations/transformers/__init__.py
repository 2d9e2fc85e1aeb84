"""GSPN-2 in the vision encoders of transformers; needs the extra `gspn2[transformers]`.

from transformers import AutoModel
from gspn2.integrations.transformers import Distiller, VisionMixers, mount, unmount

model = AutoModel.from_pretrained(folder)                     # ViT, CLIP, SigLIP, what sees by them, ...
mixers = mount(model)                                         # fresh mixers, for training
mixers.save_pretrained("mixers")

mount(model, VisionMixers.from_pretrained("mixers"))          # trained ones, on another day
unmount(model)                                                # the model as it was

Distiller(model)(pixel_values)["loss"].backward()             # the replaced attention is the teacher
"""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    # The name stays that of what is missing: for those who ask, the command among them.
    hint = f'gspn2.integrations.transformers needs {error.name}: pip install "gspn2[transformers]"'
    raise ModuleNotFoundError(hint, name=error.name) from error

from .distillation import Distiller
from .mixers import AttentionMixer, VisionMixers, VisionMixersConfig
from .mounting import is_mounted, mixers_of, mount, unmount

__all__ = [
    "AttentionMixer",
    "Distiller",
    "VisionMixers",
    "VisionMixersConfig",
    "is_mounted",
    "mixers_of",
    "mount",
    "unmount",
]
