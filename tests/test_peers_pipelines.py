"""`model.sampler(steps)` beside what diffusers draws with the same scheduler_config.json."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from tests import recipes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # other people's imports
    why = "needs the peers extra: pip install 'ddim_jax[peers]'"
    torch = pytest.importorskip("torch", reason=why)
    diffusers = pytest.importorskip("diffusers", reason=why)
    from diffusers.schedulers import scheduling_ddpm

pytestmark = pytest.mark.filterwarnings("default")


def theirs(settings, steps, pipeline=None, eta=0.0):
    """The loop of their pipelines, in float32, with our x_T and z."""
    model = recipes.model_of(settings, pipeline)
    name = settings["_class_name"]
    if pipeline in ("DDIMPipeline", "PNDMPipeline"):
        name = pipeline.replace("Pipeline", "Scheduler")
    scheduler = getattr(diffusers, name).from_config(settings)
    scheduler.set_timesteps(steps)
    x, kind = torch.tensor(recipes.X), model.prediction.kind
    alpha_bar = np.asarray(model.schedule.alpha_bar)
    if name == "EulerDiscreteScheduler":
        x = x * scheduler.init_noise_sigma
    for i in scheduler.timesteps:
        i = int(i)
        z = torch.tensor(np.asarray(recipes.noise(i + 1)))
        options = {"DDIMScheduler": {"eta": eta, "variance_noise": z if eta else None}}
        if settings.get("algorithm_type", "").startswith("sde"):
            options[name] = {"variance_noise": z}
        scheduling_ddpm.randn_tensor = lambda *_, z=z, **__: z
        a, b = (float(np.sqrt(v)) for v in (alpha_bar[i + 1], 1 - alpha_bar[i + 1]))
        seen = x
        if name == "EulerDiscreteScheduler":
            i = torch.tensor(float(i))
            seen = scheduler.scale_model_input(x, i)
        out = recipes.output(torch, kind, a, b, torch.tensor(float(i)), seen)
        x = scheduler.step(out, i, x, **options.get(name, {})).prev_sample
    return x.numpy()


def ours(settings, steps, pipeline=None, eta=None):
    sampler = recipes.model_of(settings, pipeline).sampler(steps, eta=eta)
    return np.asarray(sampler(jnp.asarray(recipes.X), recipes.KEY))


def error(settings, steps, pipeline=None, eta=0.0):
    expected = theirs(settings, steps, pipeline, eta)
    assert np.isfinite(expected).all()
    got = ours(settings, steps, pipeline, eta or None)
    return np.abs(got - expected).max() / max(1, np.abs(expected).max())
