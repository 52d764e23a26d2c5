"""The configurations of OpenAI's networks that are tested, and their weights, inputs and noise."""

import hashlib
import math

import numpy as np

from tests.pseudo_weights import uniform

SMALL = {
    **{"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"},
    **{"attention_resolutions": "4", "num_heads": 1},
}
IMPROVED = {
    **{"repository": "improved-diffusion", "image_size": 32, "num_channels": 32},
    **{"num_res_blocks": 1, "attention_resolutions": "8", "num_heads": 2},
}
CASES = {
    "plain": {**SMALL, "use_scale_shift_norm": False},
    "legacy heads": {**SMALL, "num_heads": 2, "learn_sigma": True},
    "new order": {**SMALL, "num_heads": 2, "use_new_attention_order": True},
    "head channels": {
        **{**SMALL, "num_head_channels": 16, "resblock_updown": True, "learn_sigma": True},
        **{"use_new_attention_order": True, "noise_schedule": "cosine", "class_cond": True},
    },
    "block up and down": {**SMALL, "resblock_updown": True, "use_scale_shift_norm": False},
    "heads upsample": {**SMALL, "num_heads": 2, "num_heads_upsample": 4, "image_size": 16},
    "x_0": {**SMALL, "predict_xstart": True, "num_res_blocks": 2, "attention_resolutions": "8,4"},
    "rescaled": {
        **{**SMALL, "diffusion_steps": 400, "rescale_timesteps": True, "learn_sigma": True},
        **{"noise_schedule": "cosine"},
    },
    "linear of 250": {
        **{**SMALL, "diffusion_steps": 250, "rescale_timesteps": False, "dropout": 0.3},
        **{"channel_mult": "1,1,2", "image_size": 16},
    },
    "improved": {**IMPROVED, "diffusion_steps": 4000, "learn_sigma": True},
    "improved classes": {
        **{**IMPROVED, "class_cond": True, "noise_schedule": "cosine"},
        **{"use_scale_shift_norm": False, "num_heads_upsample": 1},
    },
}
# Name → (case, timestep_respacing, loop, whether x̂_0 is clipped).
SAMPLES = {
    "ddim5": ("legacy heads", "ddim5", "ddim_sample_loop", True),
    "ddim5 classes": ("head channels", "ddim5", "ddim_sample_loop", True),
    "ddim8 x_0": ("x_0", "ddim8", "ddim_sample_loop", False),
    "chain of 5": ("legacy heads", "5", "p_sample_loop", True),
    "chain of 2,4": ("rescaled", "2,4", "p_sample_loop", True),
}
# A case, a classifier, timestep_respacing of DDIM without clipping, and the scale.
GUIDED = ("legacy heads", "classifier attention", "ddim5", 2.0)
_SMALL = {
    **{"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 10},
    **{"num_res_blocks": 1, "attention_resolutions": (2,), "channel_mult": (1, 4)},
    **{"num_head_channels": 64, "use_scale_shift_norm": True, "resblock_updown": True},
}
_FLAGS = {
    **{"image_size": 8, "classifier_width": 32, "classifier_depth": 1},
    **{"classifier_attention_resolutions": "4"},
}
# Name → (arguments of EncoderUNetModel, the flags that say so).
CLASSIFIERS = {
    f"classifier {pool}": (
        {**_SMALL, "pool": pool, "resblock_updown": blocks, "use_scale_shift_norm": blocks},
        {
            **{**_FLAGS, "classifier_pool": pool, "classifier_resblock_updown": blocks},
            **{"classifier_use_scale_shift_norm": blocks},
        },
    )
    for pool, blocks in (
        *(("attention", True), ("adaptive", False), ("spatial", True), ("spatial_v2", False)),
    )
}


def signed(name, shape):
    """Numbers of mean 0 and variance 1, the same everywhere."""
    return (np.sqrt(3) * (2 * uniform(name, shape) - 1)).astype(np.float32)


def weights(shapes, case):
    """Tensors by name, of a scale that keeps activations near 1; none is zero."""
    state = {}
    for name, shape in shapes.items():
        z = signed(f"{case} {name}", tuple(shape))
        if len(shape) == 1:  # biases; and the scale of a norm
            state[name] = 0.1 * z + np.float32(name.endswith("weight"))
        elif name in ("label_emb.weight", "out.2.positional_embedding"):
            state[name] = 0.5 * z
        else:
            state[name] = z / np.float32(np.sqrt(np.prod(shape[1:])))
    return state


def drawn(case, size, classes=1000):
    """x (2, size, size, 3), t (2,) in 1..200 and labels (2,)."""
    t, y = uniform(f"{case} t", (2,)), uniform(f"{case} y", (2,))
    return (
        signed(f"{case} x", (2, size, size, 3)),
        1 + (t * 200).astype(int),
        (y * classes).astype(int),
    )


def noise(sample, steps, size):
    """x_T and the z of each step, (1 + S, 2, size, size, 3)."""
    return signed(f"{sample} noise", (1 + steps, 2, size, size, 3))


def digest(shapes):
    """(number of parameters, a digest of all names and shapes)."""
    lines = "\n".join(f"{name} {tuple(shapes[name])}" for name in sorted(shapes))
    size = sum(math.prod(shape) for shape in shapes.values())
    return [size, hashlib.sha256(lines.encode()).hexdigest()]
