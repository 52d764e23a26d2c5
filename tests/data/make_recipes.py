"""Writes recipes.npz: images that diffusers draws with the network of tests/recipes.py.

`PYTHONPATH=. python tests/data/make_recipes.py` where the peers extra is installed.
"""

import json
import pathlib

import numpy as np

from tests.test_peers_pipelines import theirs

V = {"prediction_type": "v_prediction"}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **V}
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
CASES = {  # name: class, its settings, S, the pipeline
    "ddpm": ("DDPMScheduler", {}, 5, "DDPMPipeline"),
    "ddpm-large": (
        "DDPMScheduler",
        {"variance_type": "fixed_large", "timestep_spacing": "trailing"},
        5,
        None,
    ),
    "ddpm-learned": ("DDPMScheduler", {"variance_type": "learned_range"}, 5, None),
    "ddim": ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}, 5, "DDIMPipeline"),
    "ddim-to-first": ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}, 5, None),
    "zero-snr": ("DDIMScheduler", {"clip_sample": False, **ZERO}, 5, None),
    "pndm": ("PNDMScheduler", {}, 5, "PNDMPipeline"),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True, "steps_offset": 1}, 5, None),
    "dpm-3": (DPM, {"solver_order": 3, "thresholding": True, "sample_max_value": 1.2}, 6, None),
    "dpm-sde": (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, 6, None),
    "dpm-karras": (DPM, {"use_karras_sigmas": True}, 6, None),
    "unipc-3": (UNIPC, {"solver_order": 3, "disable_corrector": [1]}, 6, None),
    "unipc-zero-snr": (UNIPC, {"final_sigmas_type": "sigma_min", **ZERO}, 6, None),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}, 6, None),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, 6, None),
}

if __name__ == "__main__":
    cases, images = [], []
    for name, (kind, settings, steps, pipeline) in CASES.items():
        settings = {"_class_name": kind, **settings}
        case = {"name": name, "settings": settings, "steps": steps, "pipeline": pipeline}
        cases.append(json.dumps(case))
        images.append(theirs(settings, steps, pipeline))
    file = pathlib.Path(__file__).with_name("recipes.npz")
    np.savez_compressed(file, cases=np.array(cases), images=np.stack(images))
