"""What the papers print, to stand beside what is measured here.

GSPN-2 (arXiv 2512.07884), on an NVIDIA A100 whose copy peak is about 2 TB/s; the sizes are the paper's.
"""

from __future__ import annotations

DEVICE = "NVIDIA A100"

# Milliseconds at 1024 x 1024, forward, in the order of `ladder.RUNGS`.
LADDER = {
    (16, 8): (71.4, 57.4, 2.4, 2.2, 2.1, 1.9, 1.8),
    (256, 1): (143.7, 139.2, 4.1, 4.5, 4.4, 4.0, 3.9),
}

# Images per second of GSPN-2-T at 224, by proxy channels.
PROXIES = {2: 1544, 4: 1492, 8: 1387, 16: 1293, 32: 1106}

# Images per second at 224 in the same figure.
BACKBONES = {"GSPN-2-T": 1544, "DeiT-S": 1759, "VMamba-T": 1686, "ConvNeXt-T": 1189, "LocalVMamba-T": 394}

# Speedups over GSPN-1 that the text states for its sweeps, by our cases at these sizes.
SWEEP = {
    "resolution 1024": {"forward": 36.8, "backward": 25.3},
    "channels 256": {"forward": 27.4, "backward": 48.6},
}

# SigLIP2-Base, 1024 x 1024, batch 32: milliseconds of attention and of propagation, module and block.
SIGLIP = {"module": (31.36, 0.174), "block": (63.08, 12.59)}
