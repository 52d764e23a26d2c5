"""The figures that the paper reports (Song, Meng & Ermon, ICLR 2021), and nothing else.

FID of 50,000 samples, T = 1000, in Tables 1 and 3; Table 2 is the mean squared error per dimension
of CIFAR-10's test images, encoded and decoded with S steps each, pixels in [0, 1].
"""

from collections.abc import Mapping, Sequence

TABLE1_STEPS = (10, 20, 50, 100, 1000)
TABLE1 = {
    "CIFAR-10 32×32": {
        "0": (13.36, 6.84, 4.67, 4.16, 4.04),
        "0.2": (14.04, 7.11, 4.77, 4.25, 4.09),
        "0.5": (16.66, 8.35, 5.25, 4.46, 4.29),
        "1": (41.07, 18.36, 8.01, 5.78, 4.73),
        "hat": (367.43, 133.37, 32.72, 9.99, 3.17),
    },
    "CelebA 64×64": {
        "0": (17.33, 13.73, 9.17, 6.53, 3.51),
        "0.2": (17.66, 14.11, 9.51, 6.79, 3.64),
        "0.5": (19.86, 16.06, 11.01, 8.09, 4.28),
        "1": (33.12, 26.03, 18.48, 13.93, 5.98),
        "hat": (299.71, 183.83, 71.71, 45.20, 3.26),
    },
}
TABLE2 = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}
TABLE3_STEPS = (10, 20, 50, 100)
TABLE3 = {
    "LSUN Bedroom 256×256": {"0": (16.95, 8.89, 6.75, 6.62), "1": (42.78, 22.77, 10.81, 6.81)},
    "LSUN Church 256×256": {"0": (19.45, 12.47, 10.84, 10.58), "1": (51.56, 23.37, 11.16, 8.27)},
}


def as_cells(
    table: Mapping[str, Sequence[float]], steps: Sequence[int]
) -> list[dict[str, str | int | float]]:
    """A table of the paper in the form of our results, with no standard errors (none are given)."""
    return [
        {"eta": eta, "S": s, "distance": value, "se": 0.0}
        for eta, row in table.items()
        for s, value in zip(steps, row, strict=True)
    ]
