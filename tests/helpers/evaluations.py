"""Rows of evaluations.jsonl, as `dit_jax.evaluate` writes them."""


def make_row(sampler="ddpm", steps=250, cfg_scale=1.5, seed=0, step=400, **values):
    """Makes a row; `values` override or add keys, in "sample" if they belong there."""
    sample = {
        "sampler": sampler,
        "steps": steps,
        "cfg_scale": cfg_scale,
        "grid": "uniform",
        "rho": 7.0,
        "eta": 0.0,
        "variance": "large",
        "cfg_interval": [0.0, 1.0],
        "num": 50_000,
        "seed": seed,
        "raw": False,
    }
    sample |= {key: values.pop(key) for key in list(values) if key in sample or "guide" in key}
    row = {"workdir": "dit", "step": step, "sample": sample, "gmacs": 118.6, "picture": "a.png"}
    row |= {"images_seen": step * 256, "train_gflops": step * 1e5, "img_per_s": None}
    row["extractor"] = {"name": "inception", "dtype": "float32", "digest": "i0"}
    row["reference"] = {"name": "imagenet256.npz", "digest": "r0"}
    return row | values
