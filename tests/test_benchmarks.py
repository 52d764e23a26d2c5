"""The benchmarks beside PyTorch, on a tiny network, our side alone."""

import contextlib
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax.networks.paper import PAPER
from experiments.benchmarks import page, parallel, peers, profile, racing, tables, train_loop

WORDS = ["--small", "--backend", "cpu", "--rounds", "2", "--sides", "ours"]
SPEC = {"what": "sampling", "batch": 8, "steps": 5}


@pytest.mark.slow
def test_a_page_says_what_ran_and_what_did_not(tmp_path, capsys):
    path = tmp_path / "page.json"
    page.main([*WORDS, "--only", "limits", "sampling", "--json", str(path)])
    found = json.loads(path.read_text())
    title = "sampling, batch 2, S = 2"
    row = found["sections"][title]["sides"]["ours"]
    seconds = found["sections"][title]["seconds"]["ours"]
    assert row["seconds"]["most"] == max(seconds)
    assert row["images_per_second"] == pytest.approx(2 / np.median(seconds))
    flops = 2 * 2 * found["settings"]["flops_per_image_and_call"]
    assert row["flops_per_second"] == pytest.approx(flops / np.median(seconds))
    assert 0 < row["memory_mb"]["above imports"] < row["memory_mb"]["peak"]
    assert found["machine"]["kind"] == "cpu"
    assert found["machine"]["limits"]["ours"]["flops_per_second"] > 0
    assert f"| {title} | ms |" in capsys.readouterr().out


def test_a_machines_limits_count_what_xla_counts(monkeypatch):
    monkeypatch.setattr(peers, "seconds", lambda call: (call(), 2.0)[1])
    found = peers.limits("ours", "float32", small=True)()
    x, matrix = jnp.zeros(2**18), jnp.zeros((256, 256))  # 1 MiB in all of x

    def xla(count, f, *args):
        return jax.jit(f).lower(*args).compile().cost_analysis()[count]

    moved = xla("bytes accessed", lambda x: x + 1, x)
    flops = xla("flops", jnp.dot, matrix, matrix)
    assert found["bytes_per_second"] == peers.PASSES * moved / 2
    assert found["flops_per_second"] == pytest.approx(peers.PASSES * flops / 2, rel=0.01)
    program = peers.increased.lower(x, 3).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == x.nbytes  # in place, and nothing is copied
    assert memory.temp_size_in_bytes < 1000
    assert (program(x, 3) == 3).all()


def test_what_time_does_not_allow_is_named(tmp_path, capsys):
    path = tmp_path / "page.json"
    page.main([*WORDS, "--seconds", "1", "--only", "sampling", "first-step", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["sections"] == {}
    assert set(found["not run"]) == {"sampling, batch 2, S = 2", "first-step"}
    assert "first-step: not run: no time was left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--json .", "exists; choose another --json"),
        ("--json no/such.json", "there is no folder no for --json"),
        ("--data-dir no/such", "there is no folder no/such for --data-dir"),
        ("--sides eager", "--sides needs 'ours'"),
        ("--sides compiled", "invalid choice: 'compiled'"),
        ("--rounds -1", "--rounds must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_at_once(words, message, capsys):
    with pytest.raises(SystemExit):
        page.main(words.split())
    assert message in capsys.readouterr().err


class Side:
    """In place of a process: ready after so many looks."""

    def __init__(self, spec, env, log):
        self.spec, self.side, self.ours = spec, spec["side"], peers.is_ours(spec["side"])
        self.state, self.why, self.facts, self.left = racing.STARTING, "", {}, spec["looks"]
        self.moving = True
        SIDES.append(self)

    def look(self):
        if self.state == racing.STARTING:
            self.state = racing.LOADED
        elif self.state == racing.PREPARING:
            self.left -= 1
            self.state = racing.PREPARING if self.left else racing.READY
        assert sum(s.state == racing.PREPARING for s in SIDES if s.ours) <= 1

    def prepare(self):
        self.state = racing.PREPARING

    def waited(self):
        return 0 if self.side != "stuck" else 100

    @contextlib.contextmanager
    def halted(self):
        self.moving = False
        yield
        self.moving = True

    def ask(self, word, seconds):
        others = [s for s in SIDES if s.state == racing.PREPARING and s.moving]
        assert not others, "compiled while another was timed"
        return {"seconds": 2.0 if self.ours else 3.0} if word == "go" else {"memory_mb": {}}

    def fail(self, why):
        self.state, self.why = racing.FAILED, why

    def kill(self):
        self.state = racing.FAILED

    def prepared(self):
        return {}


SIDES = []


def test_nothing_compiles_while_a_side_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(racing, "Worker", Side)
    SIDES.clear()

    def race(title, **looks):
        specs = [{"side": s, "looks": n, "what": title} for s, n in looks.items()]
        return racing.Race(title, specs, {s: {} for s in looks}, 2)

    races = [race("a", ours=2, eager=1), race("b", ours=5, eager=15, stuck=3), race("c", ours=1)]
    course = racing.Course(races, tmp_path, limit=4, patience=50)
    found = [course.run(r, time.time() + 60) for r in races]
    assert [set(f["sides"]) for f in found] == [{"ours", "eager"}, {"ours", "eager"}, {"ours"}]
    assert found[1]["not run"] == {"stuck": "not ready in 50 s"}
    assert found[0]["sides"]["eager"]["answers"] == [{"seconds": 3.0}] * 2


def test_a_table_holds_ratios_of_one_round(tmp_path):
    outputs = {"ours": np.array([0.5, -4.0]), "eager": np.array([0.5, -3.0])}
    times = {"ours": [2.0, 4.0, 1.0], "eager": [6.0, 4.0, 4.0]}
    sides = {}
    for name, first in outputs.items():
        np.save(tmp_path / f"{name}.npy", first)
        sides[name] = {
            "answers": [{"seconds": t} for t in times[name]],
            "output": str(tmp_path / f"{name}.npy"),
            "facts": {"version": name},
            "prepare_seconds": 1.5,
            "memory_mb": {"peak": 10.0},
        }
    whole = {"machine": {"limits": {"ours": {"flops_per_second": 80.0}}}}
    race = racing.Race("title", [SPEC], {}, 3)
    made = tables.of_race(race, {"sides": sides, "not run": {"x": "why"}}, whole, work=2.0)
    assert made["sides"]["eager"]["time_over_ours"] == {"median": 3.0, "least": 1.0, "most": 4.0}
    assert made["sides"]["eager"]["disagreement"] == 0.25  # of the largest pixel
    assert made["sides"]["ours"]["images_per_second"] == 4.0
    assert made["sides"]["ours"]["flops_per_second"] == 40.0  # 8 images, 5 calls, 2 each in 2 s
    assert made["sides"]["ours"]["of_matrix_product"] == 0.5
    assert "3.00 (1.00 to 4.00)" in made["text"]
    assert "x: not run: why" in made["text"]
    assert whole["machine"]["version"] == "ours"


@pytest.mark.slow
def test_fit_beside_a_step_by_hand():
    settings = train_loop.Settings(steps=4, every=2, rounds=1, input_seconds=0.01)
    with jax.numpy_dtype_promotion("standard"):  # for optax's Adam
        found = train_loop.prepare(settings)()
    assert found["settings"]["data"] == "digits"
    assert "data_dir" not in found["settings"]
    parts = found["rounds"][0]
    assert {k: len(parts[k]) for k in ("hand", "fit", "resumed", "saving")} == dict.fromkeys(
        ("hand", "fit", "resumed", "saving"), 2
    )
    speeds = [h / f for h, f in zip(parts["hand"], parts["fit"])]
    assert found["speed_over_hand"]["most"] == max(speeds)
    logged, counted = (found[k]["flops_per_second"] for k in ("logged", "counted"))
    assert logged == pytest.approx(counted, rel=0.01)
    assert "| resumed / fresh | " in train_loop.show(found)


def test_operations_are_those_that_xla_counts():
    config = peers.SMALL
    model = peers.random_model(config)
    x = jnp.zeros((1, config.image_size, config.image_size, config.in_channels))
    compiled = jax.jit(model.apply_fn).lower(model.params, x, jnp.ones(1, int)).compile()
    counted = compiled.cost_analysis()["flops"]  # sums, norms and nonlinearities as well
    assert 0.8 * counted < peers.network_flops(config) < counted
    assert peers.network_flops(PAPER["cifar10"]) == pytest.approx(11.62e9, rel=1e-3)


@pytest.mark.slow
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
