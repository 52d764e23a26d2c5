"""The benchmarks beside PyTorch, on a tiny network, our side alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax.networks.paper import PAPER
from experiments.benchmarks import parallel, peers, profile, sampling, training

WORDS = ["--small", "--no-memory", "--batch", "2", "--rounds", "2", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    """As where PyTorch is missing; its sides run in the benchmarks alone."""
    monkeypatch.setattr(peers, "missing", lambda *_: "torch is not installed")


@pytest.mark.slow
def test_sampling_says_what_ran_and_what_did_not(tmp_path, capsys):
    path = tmp_path / "sampling.json"
    sampling.main([*WORDS, "--steps", "2", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["settings"]["steps"] == 2
    batch = found["batches"]["2"]
    assert set(batch["sides"]) == {"ours", "network"}
    assert set(batch["not run"].values()) == {"torch is not installed"}
    ours = batch["sides"]["ours"]
    assert ours["images_per_second"] == pytest.approx(2 / ours["seconds"])
    assert ours["time_over_ours"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    flops = 2 * 2 * found["settings"]["flops_per_image_and_call"]
    assert ours["gflops"] == pytest.approx(flops / ours["seconds"] / 1e9)
    seconds = sorted(r["network"] / r["ours"] for r in batch["rounds"])
    ratio = batch["sides"]["network"]["time_over_ours"]
    assert (ratio["least"], ratio["most"]) == pytest.approx((seconds[0], seconds[-1]))
    assert "not run: torch is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--json .", "exists; choose another --json"),
        ("--json no/such.json", "there is no folder no for --json"),
        ("--only eager compiled", "invalid choice: 'compiled'"),
        ("--batch 0", "--batch must be at least 1"),
        ("--steps 0", "--steps must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_at_once(words, message, capsys):
    with pytest.raises(SystemExit):
        sampling.main(words.split())
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_training_has_a_table_for_each_part(tmp_path, monkeypatch):
    monkeypatch.delitem(training.WORK, training.STEP)  # which compiles for long
    path = tmp_path / "training.json"
    training.main([*WORDS, "--json", str(path)])
    tables = json.loads(path.read_text())["batches"]["2"]
    assert set(tables) == {"forward", "forward + backward"}
    for name, passes in (("forward", 1), ("forward + backward", 3)):
        row = tables[name]["sides"]["ours"]
        work = passes * 2 * peers.network_flops(peers.SMALL)
        assert row["gflops"] * row["seconds"] * 1e9 == pytest.approx(work)
        assert set(tables[name]["not run"]) == {"eager", "torch.compile"}


def test_operations_are_those_that_xla_counts():
    config = peers.SMALL
    model = peers.random_model(config)
    x = jnp.zeros((1, config.image_size, config.image_size, config.in_channels))
    compiled = jax.jit(model.apply_fn).lower(model.params, x, jnp.ones(1, int)).compile()
    counted = compiled.cost_analysis()["flops"]  # sums, norms and nonlinearities as well
    assert 0.8 * counted < peers.network_flops(config) < counted
    assert peers.network_flops(PAPER["cifar10"]) == pytest.approx(11.62e9, rel=1e-3)


def test_disagreement_is_relative_to_the_largest_pixel():
    ours, theirs = np.array([0.5, -4.0]), np.array([0.5, -3.0])
    assert sampling.disagreement(ours, theirs, clipped=False) == 0.25
    assert sampling.disagreement(ours, np.array([0.5, -1.0]), clipped=True) == 0.0


def test_parallel_beside_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "network", lambda *_: 1.0)  # spares compiling it three times
    path = tmp_path / "parallel.json"
    parallel.main(["--steps", "4", "--window", "9", "--eta", "1", "--repeats", "1",
                   "--tolerance", "1e-3", "--json", str(path)])  # fmt: skip
    found = json.loads(path.read_text())["eta"]["1"]["windows"]
    assert set(found) == {"4"}  # a window of 9 is all of τ
    assert 1 <= found["4"]["rounds"] <= 4
    assert found["4"]["differs"] < 1e-2
    assert "| 4 | " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parallel.main(["--window", "0"])
    assert "--window must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_profile_counts_each_kernel_as_what_is_fused_in_it(capsys, monkeypatch):
    """The programs are of this machine's compiler; the kernels are as a GPU's trace has them."""
    kernels = [
        profile.Kernel("sm90_xmma_fprop_implicit_gemm", "cudnn-conv.3", 6e-3, 3),
        profile.Kernel("memcpy32_post", "command_buffer_1", 1e-3, 5),
    ]

    def record(call, rounds, keep):
        jax.block_until_ready(call())
        return kernels, 10e-3, 2e-3

    monkeypatch.setattr(profile, "record", record)
    profile.main(["--preset", "digits", "--batch", "2", "--rounds", "2", "--steps", "3"])
    printed = capsys.readouterr().out
    assert printed.count("| convolution, product | ") == 3
    assert "a train step, digits, batch 2, bfloat16: 5.00 ms each" in printed
    assert "2 train steps in a call, digits, batch 2, bfloat16: 5.00 ms each" in printed
    assert "| copy, layout | 0.50 | 10.0% |" in printed
    assert "| gaps | 1.00 | 20.0% |" in printed
    ours = jax.jit(lambda x: jnp.sqrt(x) + 1).lower(jnp.ones(4)).compile().as_text()
    assert any("sqrt" in words for words in profile.fused_names(ours).values())
