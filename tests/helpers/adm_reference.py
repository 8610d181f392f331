"""ADM's UNet in NumPy, with weights under their published names, as a reference for the import."""

import numpy as np

GROUPS, HEAD_DIM, CLASSES = 4, 8, 5


class Published:
    """ADM's forward pass on NCHW arrays in f64; each weight is drawn at its first use.

    `self[name, *shape]` is the weight of this name and shape.
    """

    def __init__(self, config, new_attention_order):
        self.config, self.new_attention_order = config, new_attention_order
        self.rng, self.weights = np.random.default_rng(0), {}

    def __getitem__(self, item):
        name, *shape = item
        if name not in self.weights:
            weight = 0.2 * self.rng.standard_normal(shape)
            self.weights[name] = weight.astype(np.float32)
        assert self.weights[name].shape == tuple(shape)
        return self.weights[name].astype(np.float64)

    def linear(self, x, name, size):
        return x @ self[f"{name}.weight", size, x.shape[-1]].T + self[f"{name}.bias", size]

    def conv(self, x, name, channels, kernel=3, stride=1):
        weight = self[f"{name}.weight", channels, x.shape[1], kernel, kernel]
        pad = kernel // 2
        padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        height, width = x.shape[2:]
        y = sum(
            np.einsum(
                "oi,bihw->bohw", weight[:, :, i, j], padded[:, :, i:, j:][..., :height, :width]
            )
            for i in range(kernel)
            for j in range(kernel)
        )
        return y[:, :, ::stride, ::stride] + self[f"{name}.bias", channels][:, None, None]

    def norm(self, x, name):
        groups = x.reshape(len(x), GROUPS, -1)
        mean, variance = groups.mean(-1, keepdims=True), groups.var(-1, keepdims=True)
        y = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
        channels = (-1, *[1] * (x.ndim - 2))
        scale, bias = self[f"{name}.weight", x.shape[1]], self[f"{name}.bias", x.shape[1]]
        return y * scale.reshape(channels) + bias.reshape(channels)

    def resnet(self, x, emb, name, channels, resample=lambda x: x):
        h = self.conv(
            resample(_silu(self.norm(x, f"{name}.in_layers.0"))), f"{name}.in_layers.2", channels
        )
        x = resample(x)
        parts = 2 if self.config["time_scale_shift"] else 1
        emb = self.linear(_silu(emb), f"{name}.emb_layers.1", parts * channels)[..., None, None]
        if parts == 2:
            h = self.norm(h, f"{name}.out_layers.0")
            h = h * (1 + emb[:, :channels]) + emb[:, channels:]
        else:
            h = self.norm(h + emb, f"{name}.out_layers.0")
        h = self.conv(_silu(h), f"{name}.out_layers.3", channels)
        if x.shape[1] != channels:
            x = self.conv(x, f"{name}.skip_connection", channels, kernel=1)
        return x + h

    def attention(self, x, name):
        batch, channels = x.shape[:2]
        flat = x.reshape(batch, channels, -1)
        h = self.norm(flat, f"{name}.norm")
        weight = self[f"{name}.qkv.weight", 3 * channels, channels, 1][:, :, 0]
        qkv = weight @ h + self[f"{name}.qkv.bias", 3 * channels][:, None]  # [B, 3C, N]
        if self.new_attention_order:
            parts = qkv.reshape(batch, 3, -1, HEAD_DIM, h.shape[-1]).swapaxes(0, 1)
        else:
            parts = qkv.reshape(batch, -1, 3, HEAD_DIM, h.shape[-1])
            parts = [parts[:, :, i] for i in range(3)]
        q, k, v = parts  # [B, H, C/H, N]
        scores = np.einsum("bhcn,bhcm->bhnm", q, k) / np.sqrt(HEAD_DIM)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        h = np.einsum("bhnm,bhcm->bhcn", weights, v).reshape(flat.shape)
        weight = self[f"{name}.proj_out.weight", channels, channels, 1][:, :, 0]
        h = weight @ h + self[f"{name}.proj_out.bias", channels][:, None]
        return x + h.reshape(x.shape)

    def __call__(self, x, t, y):
        """Applies two levels with one block each, and with attention in the second."""
        narrow, wide = 16, 32
        resample_in_blocks = self.config["resample"] == "resnet"
        angles = np.outer(t, 10000.0 ** -(np.arange(8) / 8))
        emb = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        emb = self.linear(_silu(self.linear(emb, "time_embed.0", 64)), "time_embed.2", 64)
        emb = emb + self["label_emb.weight", CLASSES, 64][y]
        h_0 = self.conv(x, "input_blocks.0.0", narrow)
        h_1 = self.resnet(h_0, emb, "input_blocks.1.0", narrow)
        if resample_in_blocks:
            h_2 = self.resnet(h_1, emb, "input_blocks.2.0", narrow, _halve)
        else:
            h_2 = self.conv(h_1, "input_blocks.2.0.op", narrow, stride=2)
        h_3 = self.resnet(h_2, emb, "input_blocks.3.0", wide)
        h_3 = self.attention(h_3, "input_blocks.3.1")
        h = self.resnet(h_3, emb, "middle_block.0", wide)
        h = self.attention(h, "middle_block.1")
        h = self.resnet(h, emb, "middle_block.2", wide)
        for i, skip in enumerate((h_3, h_2)):
            h = np.concatenate([h, skip], axis=1)
            h = self.resnet(h, emb, f"output_blocks.{i}.0", wide)
            h = self.attention(h, f"output_blocks.{i}.1")
        if resample_in_blocks:
            h = self.resnet(h, emb, "output_blocks.1.2", wide, _double)
        else:
            h = self.conv(_double(h), "output_blocks.1.2.conv", wide)
        for i, skip in ((2, h_1), (3, h_0)):
            h = np.concatenate([h, skip], axis=1)
            h = self.resnet(h, emb, f"output_blocks.{i}.0", narrow)
        return self.conv(_silu(self.norm(h, "out.0")), "out.2", 6)


def _silu(x):
    return x / (1 + np.exp(-x))


def _halve(x):
    return x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).mean((3, 5))


def _double(x):
    return x.repeat(2, axis=2).repeat(2, axis=3)
