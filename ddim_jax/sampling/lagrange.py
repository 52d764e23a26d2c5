"""What every multistep method integrates: Lagrange's polynomials through what is remembered."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ddim_jax.arrays import is_concrete


def integrals(node: Any, known: Any, at: Any, measure: Any) -> Any:
    """∫ L_j dμ for each row n, with L_j the Lagrange polynomial of one known node among them.

    L_nj(u) = Π_m (u − u_nm)/(u_nj − u_nm) over the known m ≠ j; ∫ is Σ_q L_nj(u_q) μ_q

    Args:
      node: (S, p) u_nj; those of a row that are known are distinct and finite.
      known: (S, p) bool, which nodes count.
      at: (S, Q) the quadrature's points, in the same variable.
      measure: (S, Q) its weights.

    Returns:
      (S, p), 0 where a node is not known; float64 on the host where all is concrete.

    Example:
      >>> node, known = np.array([[0.0, -1.0]]), np.array([[True, True]])
      >>> integrals(node, known, np.array([[0.0, 1.0]]), np.array([[0.5, 0.5]])).tolist()
      [[1.5, -0.5]]
    """
    xp: Any = np if is_concrete(node, known, at, measure) else jnp
    others = known[:, :, None] & known[:, None, :] & ~np.eye(node.shape[1], dtype=bool)[None]
    gap = xp.where(others, node[:, :, None] - node[:, None, :], 1)  # [n, j, m], m ≠ j
    factor = (at[:, None, None] - node[:, None, :, None]) / gap[..., None]
    lagrange = xp.where(others[..., None], factor, 1).prod(2)
    return xp.where(known, (lagrange * measure[:, None]).sum(-1), 0)
