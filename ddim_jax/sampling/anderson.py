"""Fixed-point equations, one for each image, by Anderson's iterations with a safeguard."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddim_jax.arrays import Array

_MEMORY = 5  # past iterates that Anderson's extrapolation combines
_GROWTH = 10.0  # an iterate with this many times the best residual is thrown away
_PATIENCE = 30  # iterations without a new best residual before an image is left as it is
_NEAR = 64  # units of round-off, within which _PATIENCE_NEAR replaces _PATIENCE
_PATIENCE_NEAR = 8


class _Solve(NamedTuple):
    """Anderson's iteration: the present iterate, the best one, and a ring of past differences."""

    done: Array  # () iterations done
    x: Array  # (B, D) iterate, to be evaluated
    last_x: Array  # (B, D) the iterate that x came from
    last_f: Array  # (B, D) its residual
    best_x: Array  # (B, D)
    best_f: Array  # (B, D)
    found: Array  # (B,) when best_x was found
    dx: Array  # (B, M, D) differences of iterates
    df: Array  # (B, M, D) differences of their residuals
    damping: Array  # (B,)
    plain: Array  # (B,) bool: x is a damped step with no extrapolation


def solve(residual: Callable[[Array], Array], x: Array, max_iterations: int) -> tuple[Array, Array]:
    """Solve residual(x) = 0 for each image (Anderson 1965; Walker & Ni 2011, type II).

    x ← x + β f − (ΔX + β ΔF) γ, with γ = argmin ‖f − ΔF γ‖ over the last M differences. An iterate
    that is much worse than the best is dropped together with the differences; if it was a plain
    damped step, β is halved. Solved images and those without progress are held still.
    """
    shape, batch = x.shape, x.shape[0]
    x = x.reshape(batch, -1)
    eps = float(jnp.finfo(x.dtype).eps)
    ridge = 8 * eps * jnp.eye(_MEMORY, dtype=x.dtype)
    tiny = jnp.finfo(x.dtype).tiny * jnp.eye(_MEMORY, dtype=x.dtype)

    def running(s: _Solve) -> Array:
        unit = eps * jnp.maximum(1, jnp.abs(s.best_x).max(axis=1))
        error = jnp.abs(s.best_f).max(axis=1)
        patience = jnp.where(error <= _NEAR * unit, _PATIENCE_NEAR, _PATIENCE)
        return ~(error <= unit) & (s.done - s.found < patience)

    def body(s: _Solve) -> _Solve:
        f = residual(s.x.reshape(shape)).reshape(batch, -1)
        norm, best_norm = jnp.linalg.norm(f, axis=1), jnp.linalg.norm(s.best_f, axis=1)
        kept, better = norm <= _GROWTH * best_norm, norm < best_norm
        best_x, best_f = (_where(better, a, b) for a, b in ((s.x, s.best_x), (f, s.best_f)))
        found = jnp.where(better, s.done, s.found)
        damping = jnp.where(~kept & s.plain, s.damping / 2, s.damping)

        slot, grows = s.done % _MEMORY, kept & (s.done > 0)
        dx, df = (
            _where(kept, ring.at[:, slot].set(_where(grows, new - old, 0)), 0)
            for ring, new, old in ((s.dx, s.x, s.last_x), (s.df, f, s.last_f))
        )
        x, f = (_where(kept, a, b) for a, b in ((s.x, best_x), (f, best_f)))
        gram = jnp.einsum("bmd,bnd->bmn", df, df, precision="highest")
        trace = jnp.trace(gram, axis1=1, axis2=2)[:, None, None]
        gamma = jnp.linalg.solve(
            gram + trace * ridge[None] + tiny[None],
            jnp.einsum("bmd,bd->bm", df, f, precision="highest")[..., None],
        )
        step_size = damping[:, None]
        past = jnp.sum(gamma * (dx + step_size[..., None] * df), axis=1)
        now = _Solve(s.done + 1, x + step_size * f - past, x, f, best_x, best_f, found, dx, df,
                     damping, ~kept)  # fmt: skip
        return now._replace(x=_where(running(now), now.x, best_x))

    zero, history = jnp.zeros_like(x), jnp.zeros((batch, _MEMORY, x.shape[1]), x.dtype)
    start = _Solve(
        jnp.int32(0), x, x, zero, x, jnp.full_like(x, jnp.inf), jnp.zeros(batch, jnp.int32),
        history, history, jnp.ones(batch, x.dtype), jnp.ones(batch, bool),
    )  # fmt: skip
    end = jax.lax.while_loop(lambda s: (s.done < max_iterations) & jnp.any(running(s)), body, start)
    return end.best_x.reshape(shape), end.done


def _where(condition: Array, a: Array, b: Array | float) -> Array:
    """jnp.where with a (B,) condition over (B, ...) arrays."""
    return jnp.where(condition.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
