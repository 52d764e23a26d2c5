"""Appendix A in float64 NumPy: Bayes' rule and matrix products by hand, for K categories."""

import itertools

import numpy as np


def transition(alpha_bar, t, s, K):
    """[x_s, x_t] of the Markov chain with β_i = 1 − ᾱ_i/ᾱ_{i−1}, one step at a time."""
    Q = np.eye(K)
    for i in range(s + 1, t + 1):
        beta = 1 - alpha_bar[i] / alpha_bar[i - 1]
        Q = Q @ ((1 - beta) * np.eye(K) + beta / K)
    return Q


def bayes_posterior(alpha_bar, t, s, K):
    """[x_t, x_0, x_s] q(x_s|x_t,x_0) of that chain."""
    joint = transition(alpha_bar, s, 0, K)[:, :, None] * transition(alpha_bar, t, s, K)[None]
    return np.transpose(joint / joint.sum(axis=1, keepdims=True), (2, 0, 1))


def family(alpha_bar, t, s, K, sigma):
    """[x_t, x_0, x_s] of Eq. 19."""
    a_t, a_s, eye = alpha_bar[t], alpha_bar[s], np.eye(K)
    uniform = ((1 - a_s) - (1 - a_t) * sigma) / K
    return sigma * eye[:, None] + (a_s - sigma * a_t) * eye[None] + uniform


def sigma_max(alpha_bar, t, s):
    return (1 - alpha_bar[s]) / (1 - alpha_bar[t])


def reference_posterior(alpha_bar, t, s, K, eta=0.0, sigma=None):
    sigma = sigma_max(alpha_bar, t, s) if sigma is None else sigma
    ancestral = bayes_posterior(alpha_bar, t, s, K)
    return (1 - eta) * family(alpha_bar, t, s, K, sigma) + eta * ancestral


def states(K, d):
    return np.array(list(itertools.product(range(K), repeat=d)))


def noised(alpha_bar, t, probs):
    """q(x_t) over all K^d states, and p(x_0,i|x_t) (K^d, d, K), by enumeration."""
    K, d = probs.shape[0], probs.ndim
    x, Q = states(K, d), transition(alpha_bar, t, 0, K)
    likelihood = np.prod(Q[x[:, None, :], x[None, :, :]], axis=-1)  # [x_0, x_t]
    joint = probs.reshape(-1, 1) * likelihood
    marginal = joint.sum(axis=0)
    one_hot = np.eye(K)[x]  # [x_0, i, k]
    return marginal, np.einsum("ab,aik->bik", joint, one_hot) / marginal[:, None, None]


def tv(p, q):
    return np.abs(p - np.ravel(q)).sum() / 2
