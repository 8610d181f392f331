"""Every key of a config, with its unit and constraint; the values are DiT's for ImageNet 256.

Other configs start from `get_config()` here and override a few keys; the config is locked, so a
key that is not here raises.
"""

from ml_collections import ConfigDict, config_dict

# Published combinations of process, objective and sampler, by name.
PROCESSES = {
    "ddpm": {},  # Ho et al. 2020, with the learned variance of Nichol & Dhariwal 2021
    "ddpm_v": {  # Lin et al. 2023: no signal at t = 1, predicted velocity
        "diffusion.schedule": "scaled_linear",
        "diffusion.beta_start": 0.00085,
        "diffusion.beta_end": 0.012,
        "diffusion.zero_terminal_snr": True,
        "objective.prediction": "v",
        "sample.sampler": "ddim",
        "sample.steps": 50,
        "sample.cfg_rescale": 0.7,
    },
    "vp": {  # Song et al. 2021
        "diffusion.process": "vp",
        "sample.sampler": "dpmpp2m",
        "sample.grid": "karras",
        "sample.steps": 20,
    },
    "flow": {  # Lipman et al. 2022; SiT, linear
        "diffusion.process": "flow",
        "objective.prediction": "u",
        "sample.sampler": "ab4",
        "sample.steps": 16,
    },
    "flow_logit_normal": {  # Esser et al. 2024, Stable Diffusion 3
        "diffusion.process": "flow",
        "objective.prediction": "u",
        "objective.t_distribution": "logit_normal",
        "sample.sampler": "euler",
        "sample.grid": "shifted",
        "sample.steps": 28,
    },
    "gvp": {  # SiT, generalised variance-preserving
        "diffusion.process": "gvp",
        "objective.prediction": "u",
        "sample.sampler": "ab4",
        "sample.steps": 16,
    },
    "edm": {  # Karras et al. 2022
        "diffusion.process": "edm",
        "objective.prediction": "edm",
        "objective.weight": "edm",
        "objective.t_distribution": "log_normal",
        "objective.t_mean": -1.2,
        "objective.t_std": 1.2,
        "sample.sampler": "heun",
        "sample.grid": "karras",
        "sample.steps": 18,
    },
}


def get_config(model: str = "dit", process: str = "ddpm") -> ConfigDict:
    """Returns all keys of a run of a noise predictor, "dit" or "unet", or of an autoencoder, "vae".

    Args: process, of a noise predictor: one of PROCESSES.
    """
    config = ConfigDict()
    _add_run(config)
    _add_optim(config)
    _add_data(config)
    _add_mesh(config)
    if model == "vae":
        _add_vae(config)
        _add_autoencoder(config)
        return config.lock()
    if model not in ("dit", "unet"):
        raise ValueError(f"unknown {model=}; choose dit, unet or vae.")
    if process not in PROCESSES:
        raise ValueError(f"unknown {process=}; choose one of {', '.join(PROCESSES)}.")
    (_add_dit if model == "dit" else _add_unet)(config)
    _add_condition(config)
    _add_diffusion(config)
    _add_objective(config)
    _add_latents(config)
    _add_sample(config)
    _add_fid(config)
    config.update_from_flattened_dict(PROCESSES[process])
    config.model.learn_sigma = process == "ddpm"
    return config.lock()


def _add_run(config):
    config.seed = 0  # of parameters, data order, noise and label dropout
    config.init_from = ""  # workdir whose newest EMA weights a new run of that model begins with
    config.total_steps = 400_000  # optimizer steps
    config.batch_size = 256  # examples per optimizer step, over all devices
    config.grad_accumulation_steps = 1  # divides batch_size per device
    config.log_every_steps = 100  # metrics are means over these steps
    config.eval_every_steps = 10_000  # held-out loss of the EMA weights, and at the end; 0 is never
    config.eval_draws = 1  # of time and noise for each held-out image, always the same ones
    config.sample_every_steps = 0  # picture by the EMA weights, samples/<step>.png; 0 is never
    config.sample_num_images = 16  # in that picture; at most 10,000
    config.checkpoint_every_steps = 10_000  # and at the last step
    config.checkpoint_keep = 3  # most recent checkpoints kept, at least 2 to fall back on
    config.checkpoint_keep_every_steps = 0  # checkpoints at multiples are kept for good; 0 is none
    # A name in metrics.jsonl, such as eval_loss or fid5k: the EMA weights of the step where it was
    # best are kept in the workdir best/ of the workdir; empty keeps none.
    config.checkpoint_best_metric = ""
    config.profile_start_step = 0  # first step of a profiler trace; 0 is no trace
    config.profile_num_steps = 5  # length of the trace, steps


def _add_optim(config):
    config.optim = ConfigDict()
    config.optim.learning_rate = 1e-4  # peak
    config.optim.schedule = "constant"  # constant, cosine (to 0 at total_steps)
    config.optim.warmup_steps = 0  # linear; less than total_steps
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0  # decoupled, of all parameters
    config.optim.grad_clip_norm = 0.0  # global norm; 0 is off
    # 0 is off; else the learning rates of matrices whose input grows with hidden_size are times
    # mup_base_width / hidden_size, so that one rate serves all widths.
    config.optim.mup_base_width = 0
    config.optim.ema_decay = 0.9999  # per step, from the initial weights


def _add_data(config):
    config.data = ConfigDict()
    config.data.source = "tfds"  # tfds, folder (docs/data.md)
    config.data.name = "imagenet2012"  # of images: TFDS name or directory, or image folder
    config.data.data_dir = ""  # TFDS data directory; empty is TFDS's standard one
    config.data.train_split = "train"  # of the images; those of moments are train and eval
    config.data.eval_split = "validation"  # empty: no held-out loss
    # Pixels after the ADM crop: one number for a square, or (height, width); at most 8192.
    config.data.image_size = _size(256)
    config.data.image_channels = 3  # 1 grey, 3 RGB
    # Of images with captions: TFDS's feature, such as caption or captions/text; of image folders
    # the key in metadata.jsonl, mostly text. Empty: none are read.
    config.data.caption_feature = ""
    config.data.captions_per_image = 1  # the first so many; each time one of them is drawn
    config.data.flip = True  # mirror images with probability 1/2, before the VAE
    config.data.cache = False  # keep decoded examples in host memory
    config.data.num_workers = 0  # processes that read; 0 reads in threads of this one
    config.data.num_threads = 4  # reading threads per process; 0 reads in the training loop
    config.data.prefetch_batches = 8  # that wait in host memory, per process


def _add_mesh(config):
    config.mesh = ConfigDict()  # the product is the number of devices; one may be -1
    config.mesh.data = -1  # copies of the model, each with its share of the batch
    config.mesh.fsdp = 1  # shards of state and batch
    config.mesh.tensor = 1  # shards of heads and MLP width


def _add_dit(config):
    config.model = ConfigDict()
    config.model.name = "dit"
    config.model.input_size = _size(32)  # of x_0, latent or pixels; or (height, width)
    config.model.patch_size = 2  # divides input_size
    config.model.in_channels = 4  # channels of x_0
    config.model.hidden_size = 1152  # multiple of num_heads and of 4
    config.model.depth = 28  # blocks
    config.model.num_heads = 16
    config.model.mlp_ratio = 4.0  # MLP width / hidden_size; at most 100
    # How time and label come in: in-context, cross-attention, adaLN, adaLN-Zero.
    config.model.block = "adaLN-Zero"
    config.model.learn_sigma = True  # predict the variance too, trained with the hybrid loss
    config.model.dtype = "float32"  # of activations: float32, bfloat16
    config.model.attention = "auto"  # auto, xla, cudnn
    config.model.remat = "none"  # recomputed in the backward pass: none, dots (all else), full
    config.model.scan_unroll = False  # True: fast steps on one GPU; False: fast compiles, TPU


def _add_unet(config):
    # models.unet.PRESETS has published combinations of these keys.
    config.model = ConfigDict()
    config.model.name = "unet"
    config.model.input_size = _size(32)  # of x_0, latent or pixels; or (height, width)
    config.model.in_channels = 4  # channels of x_0
    config.model.base_channels = 192  # even
    # Of each level, from the full size inwards, times base_channels; each but the first halves the
    # size.
    config.model.channel_mult = (1, 2, 3, 4)
    config.model.blocks_per_level = 2  # residual blocks; on the way up one more
    config.model.attention_levels = (1, 2, 3)  # 0 is the full size; the middle always has attention
    # Blocks of self-attention, cross-attention to the label or caption and feed-forward, in each
    # place with attention, as in latent diffusion; 0: self-attention alone, as in DDPM and ADM.
    config.model.transformer_depth = 0
    config.model.num_heads = 0  # either this or head_dim is 0
    config.model.head_dim = 64  # divides the channels of levels with attention
    config.model.time_scale_shift = True  # the time scales and shifts norms (ADM), or is added
    config.model.resample = "resnet"  # resnet, by residual blocks (ADM); conv, by convolutions
    config.model.norm_groups = 32  # divides the channels of all levels
    config.model.norm_epsilon = 1e-5
    config.model.dropout = 0.0  # of residual blocks, in [0, 1)
    config.model.learn_sigma = True  # predict the variance too, trained with the hybrid loss
    config.model.dtype = "float32"  # of activations: float32, bfloat16
    config.model.attention = "auto"  # of self-attention: auto, xla, cudnn
    config.model.remat = "none"  # recomputed in the backward pass: none, dots (all else), full


def _add_condition(config):
    # label: a class. tokens: the words of a caption, read by a text encoder that is trained along.
    # context: the outputs of the frozen encoder text.encoder.
    config.model.condition = "label"
    config.model.num_classes = 1000
    # Guidance leads away from it: class num_classes, or the empty caption. Trained by
    # objective.condition_dropout; without it the model is never guided.
    config.model.null_condition = True
    config.model.context_size = 0  # tokens, context: width of the encoder
    config.model.text_vocab_size = 4096  # tokens: ids that words are hashed to
    config.model.text_length = 32  # tokens: words of a caption; longer ones are cut
    config.model.text_depth = 2  # tokens: blocks of the encoder
    config.model.text_num_heads = 4  # tokens: divides context_size

    config.text = ConfigDict()
    # context: workdir that dit_jax.convert clip wrote; where a run is read, as latents.vae below.
    config.text.encoder = ""
    config.text.encoder_digest = ""  # of its parameters; the run fills in an empty one
    # context: taken from the moments' dataset, where dit_jax.encode put it, not computed each step.
    config.text.stored = False


def _add_diffusion(config):
    config.diffusion = ConfigDict()
    # ddpm, a chain of levels; in continuous time vp (its limit), flow (straight lines, as SiT),
    # gvp (trigonometric, as SiT), edm (noise of deviation up to sigma_max). PROCESSES above
    # has published combinations of these keys with those of objective and sample.
    config.diffusion.process = "ddpm"
    config.diffusion.num_steps = 1000  # ddpm: noise levels; else what the network is fed for t = 1
    config.diffusion.schedule = "linear"  # ddpm's betas: linear, scaled_linear, cosine
    config.diffusion.beta_start = 1e-4  # ddpm, vp: of the first step, of num_steps
    config.diffusion.beta_end = 0.02  # and of the last
    config.diffusion.zero_terminal_snr = False  # ddpm: no signal in the last level
    config.diffusion.sigma_min = 0.002  # edm: where samplers take their last step
    config.diffusion.sigma_max = 80.0  # edm: where they begin
    config.diffusion.sigma_data = 1.0  # of x_0, for prediction and weight edm; about 0.5 for pixels


def _add_objective(config):
    config.objective = ConfigDict()
    config.objective.prediction = "eps"  # eps, x_0, v, u (d x_t / dt), score, edm (preconditioned)
    # uniform, min_snr, p2, edm, likelihood (as 1 / t near data: not for prediction x_0)
    config.objective.weight = "uniform"
    config.objective.snr_gamma = 5.0  # of min_snr
    config.objective.p2_gamma = 1.0  # of p2
    config.objective.t_distribution = "uniform"  # uniform, logit_normal, log_normal
    config.objective.t_mean = 0.0  # logit_normal: of logit(t); log_normal: of log(sigma / alpha)
    config.objective.t_std = 1.0  # its deviation
    config.objective.low_discrepancy = False  # t spread evenly over the global batch
    config.objective.condition_dropout = 0.1  # share that the null condition replaces, below 1
    config.objective.min_t = 1e-5  # of continuous processes: no smaller t is drawn


def _add_latents(config):
    config.latents = ConfigDict()
    # x_0 is: pixels; images, encoded in every step (in model.dtype); moments, as dit_jax.encode
    # stored them; device, stored moments that are kept in device memory.
    config.latents.source = "moments"
    config.latents.moments = "imagenet256_moments"  # stored ones: TFDS name or directory
    # Workdir of the VAE, to encode images or decode samples. Where `sample` and the like read a
    # run, a directory of this name in the run's workdir is meant first.
    config.latents.vae = ""
    config.latents.vae_digest = ""  # of the moments' VAE; the run fills in an empty one
    # x_0 = (z - shift) * scale: one number, or one for each channel; empty takes the mean and the
    # inverse deviation that the stored moments' metadata records.
    config.latents.scale = (0.18215,)
    config.latents.shift = (0.0,)


def _add_sample(config):
    config.sample = ConfigDict()  # of pictures while training, and the commands' defaults
    # ddpm, ddim, ddim_level1 (of process ddpm; ends at its first level, not on data, as Stable
    # Diffusion's files), dpmpp1, dpmpp2m, dpmpp2m_sde, euler, heun, ab2, ab4, euler_maruyama.
    # docs/samplers.md says where they differ from programs of the same names.
    config.sample.sampler = "ddpm"
    config.sample.steps = 250  # of process ddpm 2..diffusion.num_steps
    # Times of the steps: uniform, quadratic, karras, shifted; of process ddpm also ddim (a stride
    # from index 0), leading (from 1), trailing (from the last level down), dpm_leading and
    # dpm_linspace (diffusers' DPM-Solver), or 'a,b,c', counts for equal parts of the chain, the
    # part next to data first.
    config.sample.grid = "uniform"
    config.sample.rho = 7.0  # karras: its exponent
    config.sample.shift = 3.0  # shifted: its factor
    config.sample.variance = "large"  # ddpm without a learned one: large (beta), small (posterior)
    config.sample.eta = 0.0  # ddim, ddim_level1: 0 deterministic, 1 DDPM's variance
    config.sample.churn = 0.0  # heun: EDM's S_churn, noise added before steps; 0 is deterministic
    config.sample.churn_range = (0.0, 1e9)  # of sigma / alpha where it churns: S_tmin, S_tmax
    config.sample.churn_noise = 1.0  # S_noise
    config.sample.sde_diffusion = "sigma"  # euler_maruyama: sigma (as SiT), sbdm (the process's)
    # euler_maruyama: the step to data without noise, mean, euler, tweedie; none takes no such step.
    config.sample.last_step = "mean"
    # The time at which this step begins; with none, at which sampling ends. 0 leaves the step out.
    # None is SiT's time: 0.04; with none 0 (flow, gvp) or 1e-3 (vp, or a predicted eps or score).
    # For edm it is sigma_min / sigma_max.
    config.sample.last_step_t = config_dict.placeholder(float)
    # pixels: x_0 is kept in [-1, 1] in every step, as ADM does, and for bits per dimension.
    config.sample.clip_x_0 = False
    config.sample.cfg_scale = 1.5  # 1 is no guidance
    config.sample.cfg_channels = 0  # guided channels of x_0; 0 is all, the paper's samples use 3
    config.sample.cfg_interval = (0.0, 1.0)  # of t (edm: sigma / sigma_max): these are guided
    config.sample.cfg_rescale = 0.0  # 0..1: how far guided outputs keep unguided ones' deviation


def _add_fid(config):
    # Frechet distance of samples by the EMA weights while training: fid5k in metrics.jsonl, or
    # fd_dinov2_5k, fd_pixels_5k by other extractors.
    config.fid = ConfigDict()
    config.fid.every_steps = 0  # 0 is never
    config.fid.num_images = 5_000  # in the name; distances of other numbers are not comparable
    config.fid.steps = 50  # of sampling; all else as config.sample
    config.fid.cfg_scale = 1.0
    config.fid.reference = ""  # as --reference of dit_jax.evaluate; empty: the training images
    config.fid.extractor = ""  # inception, dinov2, pixels; empty: as dit_jax.evaluate's default
    config.fid.weights = ""  # workdir of its weights; empty: runs/<extractor>


def _add_vae(config):
    config.model = ConfigDict()
    config.model.name = "vae"
    config.model.image_channels = 3
    config.model.latent_channels = 4
    # Of each level, from the image inwards; multiples of norm_groups. Each level but the first
    # halves the size.
    config.model.block_channels = (128, 256, 512, 512)
    config.model.layers_per_block = 2  # residual blocks of a level; the decoder has one more
    config.model.norm_groups = 32
    config.model.use_quant_conv = True  # 1x1 convolutions between encoder, latents and decoder
    config.model.mid_attention = True  # over all positions of the smallest level
    config.model.dtype = "float32"  # of activations: float32, bfloat16
    config.model.remat = False  # recompute the residual blocks in the backward pass


def _add_autoencoder(config):
    config.autoencoder = ConfigDict()  # the loss
    config.autoencoder.distance = "l1"  # to the reconstruction, per value: l1, l2
    config.autoencoder.kl_weight = 1e-6  # of the KL per value; 1e-6 is latent diffusion's
    config.autoencoder.lpips_weight = 0.0  # of LPIPS; 1 is latent diffusion's
    config.autoencoder.lpips = ""  # workdir of its weights, for lpips_weight > 0

    config.latents = ConfigDict()
    config.latents.source = "pixels"  # what it is trained on


def _size(side):
    """A value that may be set to (height, width) too."""
    return config_dict.FieldReference(side, field_type=object)
