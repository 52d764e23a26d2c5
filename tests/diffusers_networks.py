"""Random UNet2DModels of every switch: settings, weights, inputs, and what diffusers gives.

`python -m tests.diffusers_networks` writes tests/data/diffusers_networks.json anew, which
tests/test_switches.py compares with; it needs `pip install 'ddim_jax[peers]'`.
"""

import json
import pathlib
import warnings

import numpy as np

from tests import pseudo_weights

STORED = pathlib.Path(__file__).parent / "data" / "diffusers_networks.json"


def draw(seed):
    """The config.json of a small network, each switch by chance."""
    rng = np.random.default_rng(seed)

    def one(*values):
        return values[rng.integers(len(values))]

    levels, groups = one(2, 2, 3), one(2, 4)
    widths = [groups * int(rng.integers(8 // groups, 24 // groups + 1)) for _ in range(levels)]
    down = [one("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D") for _ in widths]
    up = [one("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D") for _ in widths]
    divisors = [n for n in (1, 2, 3, 4, 6, 8) if widths[-1] % n == 0]
    in_channels = one(1, 3, 3)
    kinds = [{"class_embed_type": kind} for kind in ("timestep", "identity")]
    labels = one({}, {"num_class_embeds": 5}, *kinds)
    return {
        "_class_name": "UNet2DModel",
        "sample_size": one(8, 8, [8, 12]),
        "in_channels": in_channels,
        "out_channels": one(in_channels, 2 * in_channels),
        "center_input_sample": one(False, True),
        "time_embedding_type": one("positional", "positional", "learned"),
        "time_embedding_dim": one(None, 20),
        "freq_shift": one(0, 1),
        "flip_sin_to_cos": one(True, False),
        "down_block_types": [one("", "", "UNetRes") + name for name in down],
        "up_block_types": up,
        "mid_block_type": one("UNetMidBlock2D", "UNetMidBlock2D", "UNetMidBlock2D", None),
        "block_out_channels": widths,
        "layers_per_block": one(1, 2),
        "mid_block_scale_factor": one(1, 1.4142135),
        "downsample_padding": one(0, 1),
        "downsample_type": one("conv", "resnet"),
        "upsample_type": one("conv", "resnet"),
        "dropout": one(0.0, 0.1),
        "act_fn": one("silu", "swish", "mish", "gelu", "relu"),
        "attention_head_dim": one(None, 3, 4, 8),
        "norm_num_groups": groups,
        "attn_norm_num_groups": one(None, None, *divisors[-2:]),
        "norm_eps": one(1e-6, 1e-5, 1e-3),
        "resnet_time_scale_shift": one("default", "scale_shift"),
        "add_attention": one(True, True, False),
        "num_train_timesteps": 50,
        **labels,
    }


def inputs(settings):
    """x (2, H, W, C), 0-based times (2,) and labels, None without, as NumPy arrays."""
    size = settings["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    x = 2 * pseudo_weights.uniform("x", (2, height, width, settings["in_channels"])) - 1
    width = settings["time_embedding_dim"] or 4 * settings["block_out_channels"][0]
    labels = {"timestep": np.array([3, 40]), "identity": pseudo_weights.uniform("l", (2, width))}
    label = labels.get(settings.get("class_embed_type"))
    if "num_class_embeds" in settings:
        label = np.array([4, 0])
    if label is not None and label.dtype == np.float64:
        label = label.astype(np.float32)
    return x.astype(np.float32), np.array([0, 43]), label


def peer(settings):
    """The real UNet2DModel with pseudo-random weights, none of them zero."""
    import torch
    from diffusers import UNet2DModel

    network = UNet2DModel.from_config(settings).eval()
    state = pseudo_weights.state({k: tuple(v.shape) for k, v in network.state_dict().items()})
    network.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return network


def run_peer(network, x, i, labels, dtype="float32"):
    """Its output, (B, H, W, C)."""
    import torch

    kind = getattr(torch, dtype)
    x = torch.from_numpy(x.transpose(0, 3, 1, 2)).to(kind)
    labels = None if labels is None else torch.from_numpy(labels)
    if labels is not None and labels.is_floating_point():
        labels = labels.to(kind)
    network.time_proj.register_forward_hook(lambda module, given, out: out.to(kind))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = network.to(kind)(x, torch.from_numpy(i), class_labels=labels).sample
    return y.numpy().transpose(0, 2, 3, 1)


def values(settings):
    """The values that a setting has, of lists those of their entries."""
    for name, value in settings.items():
        if name.endswith("_types"):
            yield from ((name, block.removeprefix("UNetRes")) for block in value)
        elif name not in ("block_out_channels", "sample_size", "in_channels", "out_channels"):
            yield name, str(value)


def few(seeds, count):
    """Seeds that have most of all values among them, greedily."""
    chosen, seen = [], set()
    while len(chosen) < count:
        best = max(seeds, key=lambda seed: len({*values(draw(seed))} - seen))
        chosen.append(best)
        seen |= {*values(draw(best))}
    return chosen, {*(v for seed in seeds for v in values(draw(seed)))} - seen


def main():
    warnings.simplefilter("ignore")
    seeds, missed = few(range(200), 7)
    print(f"seeds {seeds}; values in none: {sorted(missed)}")
    stored = []
    for seed in seeds:
        settings = draw(seed)
        y = run_peer(peer(settings), *inputs(settings), "float64")
        stored.append({"settings": settings, "output": np.round(y, 6).tolist()})
    STORED.parent.mkdir(exist_ok=True)
    STORED.write_text(json.dumps(stored) + "\n")


if __name__ == "__main__":
    main()
