"""What OpenAI's own code computes, as references for tests/test_openai.py.

Run with PyTorch and checkouts of openai/guided-diffusion and openai/improved-diffusion:

    python tests/data/make_openai.py PATH/guided-diffusion PATH/improved-diffusion

It writes openai.npz beside this file. Weights, inputs and noise are drawn by NumPy, so that only
outputs, and the names and shapes of the tensors, are kept.
"""

import argparse
import importlib
import json
import pathlib
import sys
import types

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from ddim_jax.weights.openai_published import CLASSIFIERS as PUBLISHED_CLASSIFIERS
from ddim_jax.weights.openai_published import PUBLISHED
from tests.openai_cases import CASES, CLASSIFIERS, GUIDED, SAMPLES, digest, drawn, noise, weights

OUT = pathlib.Path(__file__).with_name("openai.npz")


def package(checkout, name):
    """A package of theirs; what talks to other processes and files is not needed."""
    for missing in ("blobfile", "mpi4py"):
        sys.modules.setdefault(missing, types.ModuleType(missing))
    sys.path.insert(0, str(checkout))
    return importlib.import_module(f"{name}.script_util"), importlib.import_module(f"{name}.unet")


def filled(torch, network, case):
    """The network with our weights, and the names and shapes of its tensors."""
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    state = {name: torch.from_numpy(array) for name, array in weights(shapes, case).items()}
    network.load_state_dict(state)
    return network.eval(), shapes


def main(guided, improved):
    import torch

    scripts = {
        "guided-diffusion": package(guided, "guided_diffusion"),
        "improved-diffusion": package(improved, "improved_diffusion"),
    }
    out, shapes, networks = {}, {}, {}
    for name, flags in CASES.items():
        script, _ = scripts[flags.get("repository", "guided-diffusion")]
        flags = {k: v for k, v in flags.items() if k != "repository"}
        all_flags = script.model_and_diffusion_defaults() | flags
        network, diffusion = script.create_model_and_diffusion(**all_flags)
        network, shapes[name] = filled(torch, network, name)
        x, t, y = drawn(name, all_flags["image_size"])
        classes = {"y": torch.from_numpy(y)} if all_flags["class_cond"] else {}
        with torch.no_grad():
            scaled = torch.from_numpy(t - 1)
            if all_flags["rescale_timesteps"]:
                scaled = scaled.float() * (1000.0 / all_flags["diffusion_steps"])
            output = network(torch.from_numpy(x.transpose(0, 3, 1, 2)), scaled, **classes)
        out[name] = output.numpy().transpose(0, 2, 3, 1)
        networks[name] = network, all_flags, classes, script
    for name, how in SAMPLES.items():
        case, respacing, loop, clip = how
        network, flags, classes, script = networks[case]
        _, diffusion = script.create_model_and_diffusion(
            **flags | {"timestep_respacing": respacing}
        )
        steps = len(diffusion.timestep_map)
        out[f"{name} tau"] = np.array(diffusion.timestep_map) + 1
        draws = noise(name, steps, flags["image_size"]).transpose(0, 1, 4, 2, 3)
        queue = iter(torch.from_numpy(draws[1:]))
        real, torch.randn_like = torch.randn_like, lambda x, queue=queue: next(queue)
        try:
            x_0 = getattr(diffusion, loop)(
                network,
                draws[0].shape,
                noise=torch.from_numpy(draws[0]),
                clip_denoised=clip,
                model_kwargs=classes,
                device="cpu",
            )
        finally:
            torch.randn_like = real
        out[name] = x_0.numpy().transpose(0, 2, 3, 1)
        if loop == "p_sample_loop":
            index = torch.full((2,), steps // 2)
            step = diffusion.p_mean_variance(
                *(network, torch.from_numpy(draws[0]), index, clip, None, classes)
            )
            for part in ("mean", "log_variance"):
                out[f"{name} {part}"] = step[part].detach().numpy().transpose(0, 2, 3, 1)
    (_, unet), classifiers = scripts["guided-diffusion"], {}
    for name, (arguments, _) in CLASSIFIERS.items():
        network, shapes[name] = filled(torch, unet.EncoderUNetModel(**arguments), name)
        classifiers[name] = network
        x, t, y = drawn(name, arguments["image_size"], arguments["out_channels"])
        x = torch.from_numpy(x.transpose(0, 3, 1, 2)).requires_grad_()
        log_p = torch.log_softmax(network(x, torch.from_numpy(t - 1)), -1)
        (gradient,) = torch.autograd.grad(log_p[range(2), torch.from_numpy(y)].sum(), x)
        out[name] = log_p.detach().numpy()
        out[f"{name} gradient"] = gradient.numpy().transpose(0, 2, 3, 1)
    case, name, respacing, scale = GUIDED
    network, flags, _, script = networks[case]
    _, diffusion = script.create_model_and_diffusion(**flags | {"timestep_respacing": respacing})
    steps, labels = len(diffusion.timestep_map), torch.from_numpy(drawn("guided", 8, 10)[2])

    def towards(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            chosen = torch.log_softmax(classifiers[name](x, t), -1)[range(2), labels]
            return scale * torch.autograd.grad(chosen.sum(), x)[0]

    x_T = torch.from_numpy(noise("guided", steps, 8)[0].transpose(0, 3, 1, 2))
    out["guided"] = (
        diffusion.ddim_sample_loop(
            *(network, x_T.shape, x_T, False, None, towards), model_kwargs={}, device="cpu"
        )
        .numpy()
        .transpose(0, 2, 3, 1)
    )
    whole = {}
    for name, model in PUBLISHED.items():
        script, _ = scripts[model.flags["repository"]]
        flags = script.model_and_diffusion_defaults()
        flags |= {k: v for k, v in model.flags.items() if k in flags}
        with torch.device("meta"):  # no memory
            state = script.create_model_and_diffusion(**flags)[0].state_dict()
        whole[name] = digest({name: tuple(tensor.shape) for name, tensor in state.items()})
    script, _ = scripts["guided-diffusion"]
    for name, model in PUBLISHED_CLASSIFIERS.items():
        with torch.device("meta"):
            state = script.create_classifier(**script.classifier_defaults() | model.flags)
        shaped = {name: tuple(tensor.shape) for name, tensor in state.state_dict().items()}
        whole[name] = digest(shaped)
    out = {name: array.astype(np.float32) for name, array in out.items()}
    texts = {"shapes": shapes, "whole": whole}
    texts = {name: json.dumps(text, separators=(",", ":")) for name, text in texts.items()}
    np.savez_compressed(OUT, **texts, **out)
    print(f"{OUT}: {OUT.stat().st_size:,} bytes, {len(out)} arrays")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("guided", type=pathlib.Path)
    parser.add_argument("improved", type=pathlib.Path)
    arguments = parser.parse_args()
    main(arguments.guided, arguments.improved)
