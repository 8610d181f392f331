"""A synthetic scaling study, whose losses follow a known law of model size and images seen."""

import numpy as np

SIZES = {"XS": (64, 3), "S": (128, 4), "B": (192, 6), "L": (256, 8), "XL": (384, 8)}
STEPS, BATCH = (500, 2000, 8000, 32_000), 128
COST = {"adaLN-Zero": 0.0, "adaLN": 0.01, "cross-attention": 0.015, "in-context": 0.03}


def cell_of(size, patch, depth=None, block="adaLN-Zero", seed=0):
    """Returns the name of a run."""
    return f"{size}-{patch}-{depth or SIZES[size][1]}-{block}-{seed}"


def rows_of(size, patch, block="adaLN-Zero", depth=None, seeds=2, grid="sizes"):
    """Makes the rows of a model for all seeds and steps.

    Without noise the loss is E + A / N^alpha + B / D^beta, with N in gmacs and D images seen.
    """
    hidden_size, usual_depth = SIZES[size]
    depth = depth or usual_depth
    tokens = (16 // patch) ** 2
    params = 18 * hidden_size**2 * depth
    gmacs = (12 * hidden_size**2 * depth * tokens + 2 * depth * tokens**2 * hidden_size) / 1e9
    rows = []
    for seed in range(seeds):
        for step in STEPS:
            key = [patch, seed, step, depth, hidden_size, list(COST).index(block)]
            noise = np.random.default_rng(key).normal(0, 0.01)
            images = step * BATCH
            loss = 0.12 + 0.012 / gmacs**0.35 + 12 / images**0.4 + COST[block]
            loss *= 1 + 0.3 * noise
            rows.append(
                dict(
                    cell=cell_of(size, patch, depth, block, seed),
                    grid=grid,
                    model=f"{size}/{patch}",
                    network="dit",
                    size=size,
                    patch_size=patch,
                    block=block,
                    depth=depth,
                    hidden_size=hidden_size,
                    num_heads=hidden_size // 32,
                    tokens=tokens,
                    params=params,
                    gmacs=gmacs,
                    seed=seed,
                    learning_rate=1e-3,
                    batch_size=BATCH,
                    step=step,
                    images_seen=images,
                    train_gflops=6 * gmacs * images,
                    eval_mse=loss,
                    fd_pixels=400 * (loss - 0.11) * (1 + noise),
                    label_accuracy=float(np.clip(1.2 - 2 * loss + noise, 0, 1)),
                    num=5_000,
                    sampler="ddpm",
                    sampling_steps=50,
                    cfg_scale=1.0,
                )
            )
    return rows


def study():
    """Makes the rows of 5 sizes with 3 patch sizes, 2 widths with 4 depths, and S/2's 4 blocks."""
    rows = [row for size in SIZES for patch in (2, 4, 8) for row in rows_of(size, patch)]
    for size in ("S", "L"):
        for depth in {2, 4, 8, 16} - {SIZES[size][1]}:
            rows += rows_of(size, 4, depth=depth, grid="depth")
    for block in list(COST)[1:]:
        rows += rows_of("S", 2, block=block, grid="blocks")
    return rows


def samples_of(models, count=4, side=8, channels=1):
    """Makes the arrays of a file for `--samples`, with noise as images."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (len(models), count, side, side, channels), np.uint8)
    cells = np.array([cell_of(*model.split("/")) for model in models])
    return dict(image=image, label=np.arange(count, dtype=np.int32), cell=cells)
