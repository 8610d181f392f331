"""All keys of a config, each with its unit and constraint; the values are DiT's for ImageNet 256.

Other configs start from `get_config()` and override a few keys. The config is locked, so an unknown
key raises.
"""

from ml_collections import ConfigDict, config_dict

# Published combinations of process, objective and sampler, by name.
PROCESSES = {
    "ddpm": {},  # Ho et al. 2020, with the learned variance of Nichol & Dhariwal 2021
    "ddpm_v": {  # Lin et al. 2023: no signal at t = 1, prediction v
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
    """Returns the default config of a noise predictor ("dit", "unet") or an autoencoder ("vae").

    Args: process, one of PROCESSES; an autoencoder has none.
    Raises: ValueError for an unknown model or process.
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
    if model == "dit":
        _add_dit(config)
    else:
        _add_unet(config)
    _add_condition(config)
    _add_diffusion(config)
    _add_objective(config)
    _add_latents(config)
    _add_sample(config)
    _add_fid(config)
    config.update_from_flattened_dict(PROCESSES[process])
    # In continuous time no bound trains a learned variance, and ddpm_v does not learn one.
    config.model.learn_sigma = process == "ddpm"
    return config.lock()


def _add_run(config):
    config.seed = 0  # of parameters, data order, noise and condition dropout
    # Workdir of another run of the same model: this run starts from the newest EMA weights there.
    # Empty: from random weights.
    config.init_from = ""
    config.total_steps = 400_000  # optimizer steps
    config.batch_size = 256  # examples per optimizer step, over all devices
    config.grad_accumulation_steps = 1  # micro-batches per step; divides batch_size per device
    config.log_every_steps = 100  # each logged metric is the mean over these steps
    config.eval_every_steps = 10_000  # held-out loss of the EMA weights; also at the end; 0: never
    config.eval_draws = 1  # draws of (t, noise) per held-out image, the same in every evaluation
    config.sample_every_steps = 0  # picture from the EMA weights, samples/<step>.png; 0: never
    config.sample_num_images = 16  # images in this picture; at most 10,000
    config.checkpoint_every_steps = 10_000  # also at the last step
    config.checkpoint_keep = 3  # newest checkpoints kept; at least 2, so that one is a fallback
    config.checkpoint_keep_every_steps = 0  # checkpoints at multiples are never deleted; 0: none
    # Name of a metric in metrics.jsonl, such as eval_loss or fid5k. The EMA weights of its best
    # step are kept in best/, a workdir inside the workdir. Empty: none are kept.
    config.checkpoint_best_metric = ""
    config.profile_start_step = 0  # first step of a profiler trace; 0: no trace
    config.profile_num_steps = 5  # length of the trace in steps


def _add_optim(config):
    config.optim = ConfigDict()
    config.optim.name = "adamw"  # adamw
    config.optim.learning_rate = 1e-4  # after the warm-up
    config.optim.schedule = "constant"  # constant, cosine (to 0 at total_steps)
    config.optim.warmup_steps = 0  # linear; less than total_steps
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0  # decoupled, on all parameters
    config.optim.grad_clip_norm = 0.0  # largest global norm of the gradient; 0: no clipping
    # 0: off. Otherwise mup_base_width / hidden_size multiplies the learning rate of every matrix
    # whose input grows with hidden_size, so that one learning rate fits all widths.
    config.optim.mup_base_width = 0
    config.optim.ema_decay = 0.9999  # per step; the average starts at the initial weights


def _add_data(config):
    config.data = ConfigDict()
    config.data.source = "tfds"  # tfds, folder (docs/data.md)
    config.data.name = "imagenet2012"  # dataset of images: TFDS name or directory, or image folder
    config.data.data_dir = ""  # TFDS data directory; empty: TFDS's default
    config.data.train_split = "train"  # of images; stored moments always have train and eval
    config.data.eval_split = "validation"  # empty: no held-out loss
    # Pixels after the ADM crop: one number for a square, or (height, width); at most 8192.
    config.data.image_size = _size(256)
    config.data.image_channels = 3  # 1 grey, 3 RGB
    # Where the captions are. TFDS: the feature, such as caption or captions/text. Image folder: the
    # key in metadata.jsonl, usually text. Empty: no captions are read.
    config.data.caption_feature = ""
    config.data.captions_per_image = 1  # reads the first N; each use of an image draws one of them
    config.data.flip = True  # mirrors images with probability 1/2, before the VAE
    config.data.cache = False  # keeps decoded examples in host memory
    config.data.num_workers = 0  # reader processes; 0: threads of the training process read
    config.data.num_threads = 4  # reader threads per process; 0: the training loop reads
    config.data.prefetch_batches = 8  # batches waiting in host memory, per process


def _add_mesh(config):
    # The product of the axes is the number of devices. One axis may be -1: all remaining devices.
    config.mesh = ConfigDict()
    config.mesh.data = -1  # copies of the model, each with its share of the batch
    config.mesh.fsdp = 1  # shards of the state and the batch
    config.mesh.tensor = 1  # shards of the heads and the MLP width


def _add_dit(config):
    config.model = ConfigDict()
    config.model.name = "dit"
    config.model.input_size = _size(32)  # of x_0, in latents or pixels; or (height, width)
    config.model.patch_size = 2  # divides input_size
    config.model.in_channels = 4  # channels of x_0
    config.model.hidden_size = 1152  # multiple of num_heads and of 4
    config.model.depth = 28  # number of blocks
    config.model.num_heads = 16
    config.model.mlp_ratio = 4.0  # MLP width / hidden_size; at most 100
    # How blocks are conditioned on time and label: in-context, cross-attention, adaLN, adaLN-Zero.
    config.model.block = "adaLN-Zero"
    config.model.learn_sigma = True  # also predicts the variance, trained with the hybrid loss
    config.model.dtype = "float32"  # of activations: float32, bfloat16
    config.model.attention = "auto"  # kernel: auto, xla, cudnn
    # What the backward pass recomputes: none, dots (all but the products of Linears), full.
    config.model.remat = "none"
    config.model.scan_unroll = False  # True: fast steps on one GPU. False: fast compilation, TPU


def _add_unet(config):
    # models.unet_presets.PRESETS has published combinations of these keys.
    config.model = ConfigDict()
    config.model.name = "unet"
    config.model.input_size = _size(32)  # of x_0, in latents or pixels; or (height, width)
    config.model.in_channels = 4  # channels of x_0
    config.model.base_channels = 192  # even
    # Channels of each level / base_channels, full size first. Each level after the first halves the
    # size.
    config.model.channel_mult = (1, 2, 3, 4)
    config.model.blocks_per_level = 2  # residual blocks of a level; one more on the way up
    config.model.attention_levels = (1, 2, 3)  # 0 is the full size; the middle always has attention
    # Transformer blocks (latent diffusion) wherever there is attention: self-attention,
    # cross-attention to the label or caption, feed-forward. 0: only self-attention (DDPM, ADM).
    config.model.transformer_depth = 0
    config.model.num_heads = 0  # either num_heads or head_dim is 0
    config.model.head_dim = 64  # divides the channels of levels with attention
    config.model.time_scale_shift = True  # time scales and shifts norms (ADM); False: time is added
    config.model.resample = "resnet"  # by resnet, residual blocks (ADM), or conv, convolutions
    config.model.norm_groups = 32  # divides the channels of all levels
    config.model.norm_epsilon = 1e-5
    config.model.dropout = 0.0  # in residual blocks, in [0, 1)
    config.model.learn_sigma = True  # also predicts the variance, trained with the hybrid loss
    config.model.dtype = "float32"  # of activations: float32, bfloat16
    config.model.attention = "auto"  # kernel of self-attention: auto, xla, cudnn
    # What the backward pass recomputes: none, dots (all but the products of Linears), full.
    config.model.remat = "none"


def _add_condition(config):
    # label: a class. tokens: the words of a caption, read by a text encoder that is trained with
    # the model. context: the outputs of a frozen text encoder, text.encoder.
    config.model.condition = "label"
    config.model.num_classes = 1000  # label: 0 ignores the labels
    # Whether there is a null condition for guidance: class num_classes, or the empty caption.
    # objective.condition_dropout trains it. False: the model cannot be guided.
    config.model.null_condition = True
    config.model.context_size = 0  # tokens, context: width of the text encoder
    config.model.text_vocab_size = 4096  # tokens: number of ids that words are hashed to
    config.model.text_length = 32  # tokens: words of a caption; longer captions are cut
    config.model.text_depth = 2  # tokens: blocks of the text encoder
    config.model.text_num_heads = 4  # tokens: heads of the text encoder; divides context_size

    config.text = ConfigDict()
    # context: workdir that `dit_jax.convert clip` wrote. Looked up as latents.vae below.
    config.text.encoder = ""
    config.text.encoder_digest = ""  # digest of its parameters; the run fills in an empty one
    # context: True reads the encoder's outputs from the moments' dataset, where dit_jax.encode
    # stored them. False computes them in every step.
    config.text.stored = False


def _add_diffusion(config):
    config.diffusion = ConfigDict()
    # ddpm: a chain of noise levels. In continuous time: vp (the limit of ddpm), flow (straight
    # lines, as SiT), gvp (trigonometric, as SiT), edm (noise with a standard deviation up to
    # sigma_max). PROCESSES has published combinations of these keys with objective and sample.
    config.diffusion.process = "ddpm"
    config.diffusion.num_steps = 1000  # ddpm: noise levels; vp, flow, gvp: network time at t = 1
    config.diffusion.schedule = "linear"  # ddpm's betas: linear, scaled_linear, cosine
    config.diffusion.beta_start = 1e-4  # ddpm, vp: beta of the first of num_steps steps
    config.diffusion.beta_end = 0.02  # ddpm, vp: beta of the last step
    config.diffusion.zero_terminal_snr = False  # ddpm: the last level has no signal
    config.diffusion.sigma_min = 0.002  # edm: noise level where samplers take their last step
    config.diffusion.sigma_max = 80.0  # edm: noise level where samplers start
    # Standard deviation of x_0, for process, prediction and weight edm; about 0.5 for pixels.
    config.diffusion.sigma_data = 1.0


def _add_objective(config):
    config.objective = ConfigDict()
    # eps, x_0, v, u (d x_t / dt), score, edm (EDM's preconditioned output).
    config.objective.prediction = "eps"
    # Weight of the loss at each t: uniform, min_snr, p2, edm, likelihood. The last grows as 1 / t
    # near data, and faster with prediction x_0: do not combine these two.
    config.objective.weight = "uniform"
    config.objective.snr_gamma = 5.0  # min_snr: gamma
    config.objective.p2_gamma = 1.0  # p2: gamma
    config.objective.t_distribution = "uniform"  # uniform, logit_normal, log_normal
    # logit_normal: mean of logit(t); log_normal: mean of log(sigma / alpha).
    config.objective.t_mean = 0.0
    config.objective.t_std = 1.0  # standard deviation of the same quantity
    config.objective.low_discrepancy = False  # spreads t evenly over the global batch
    # Share of the conditions that the null condition replaces, if there is one; below 1.
    config.objective.condition_dropout = 0.1
    config.objective.min_t = 1e-5  # continuous processes: the smallest t that is drawn


def _add_latents(config):
    config.latents = ConfigDict()
    # What x_0 is. pixels: the image. images: its latent, encoded in every step (in model.dtype).
    # moments: a latent drawn from moments that dit_jax.encode stored. device: the same, with all
    # moments in device memory.
    config.latents.source = "moments"
    config.latents.moments = "imagenet256_moments"  # stored moments: TFDS name or directory
    # Workdir of the VAE that encodes images or decodes samples. Commands that read a run, such as
    # `sample`, first look for a directory of this name in the run's workdir.
    config.latents.vae = ""
    config.latents.vae_digest = ""  # digest of the moments' VAE; the run fills in an empty one
    # x_0 = (z - shift) * scale: one number, or one for each channel. Empty: the mean, and the
    # inverse standard deviation, from the metadata of the stored moments.
    config.latents.scale = (0.18215,)
    config.latents.shift = (0.0,)


def _add_sample(config):
    config.sample = ConfigDict()  # for pictures while training; defaults of the commands
    # A row of SAMPLERS in dit_jax/diffusion/samplers.py; `dit_jax.sample --help` describes each.
    # docs/samplers.md lists differences from programs with the same names.
    config.sample.sampler = "ddpm"
    config.sample.steps = 250  # process ddpm: 2..diffusion.num_steps
    # Times of the steps: uniform, quadratic, karras, shifted. Process ddpm also has ddim (a stride
    # from index 0), leading (a stride from index 1), trailing (evenly from the last level down),
    # dpm_leading and dpm_linspace (diffusers' DPM-Solver), and 'a,b,c': the numbers of steps in
    # equal parts of the chain, the part next to data first.
    config.sample.grid = "uniform"
    config.sample.rho = 7.0  # karras: its exponent
    config.sample.shift = 3.0  # shifted: its factor
    config.sample.variance = "large"  # ddpm, if not learned: large (beta), small (posterior)
    config.sample.eta = 0.0  # ddim, ddim_level1: 0 deterministic, 1 DDPM's variance
    config.sample.churn = 0.0  # heun: EDM's S_churn, noise added before steps; 0 is deterministic
    config.sample.churn_range = (0.0, 1e9)  # S_tmin, S_tmax: sigma / alpha where noise is added
    config.sample.churn_noise = 1.0  # S_noise: factor of that noise's standard deviation
    config.sample.sde_diffusion = "sigma"  # euler_maruyama: sigma (as SiT), sbdm (the process's)
    # euler_maruyama: the final step to data, without noise: mean, euler, tweedie. none leaves this
    # step out.
    config.sample.last_step = "mean"
    # Time at which the final step begins, or at which sampling ends if last_step is none. 0 leaves
    # the step out. None is SiT's time: 0.04; if last_step is none, 0 (flow, gvp) or 1e-3 (vp, or
    # prediction eps or score). For edm it is sigma_min / sigma_max.
    config.sample.last_step_t = config_dict.placeholder(float)
    # pixels: clips x_0 to [-1, 1] in every step, as ADM does, and for bits per dimension.
    config.sample.clip_x_0 = False
    config.sample.cfg_scale = 1.5  # 1: no guidance
    config.sample.cfg_channels = 0  # first channels, which are guided; 0: all; the paper: 3
    config.sample.cfg_interval = (0.0, 1.0)  # guided times t (edm: t = sigma / sigma_max)
    # 0..1: how far guided outputs are rescaled to the standard deviation of unguided outputs.
    config.sample.cfg_rescale = 0.0


def _add_fid(config):
    # Frechet distance of samples from the EMA weights, measured while training. Its metric's name
    # is fid5k for Inception, fd_dinov2_5k and fd_pixels_5k for the other extractors.
    config.fid = ConfigDict()
    config.fid.every_steps = 0  # 0: never
    config.fid.num_images = 5_000  # in the metric's name: only distances of one number compare
    config.fid.steps = 50  # sampling steps
    config.fid.cfg_scale = 1.0  # all other sampling settings are those of config.sample
    config.fid.reference = ""  # as --reference of dit_jax.evaluate; empty: the training images
    config.fid.extractor = ""  # inception, dinov2, pixels; empty: dit_jax.evaluate's default
    config.fid.weights = ""  # workdir of the extractor's weights; empty: runs/<extractor>


def _add_vae(config):
    config.model = ConfigDict()
    config.model.name = "vae"
    config.model.image_channels = 3
    config.model.latent_channels = 4
    # Channels of each level, full size first; multiples of norm_groups. Each level after the first
    # halves the size.
    config.model.block_channels = (128, 256, 512, 512)
    config.model.layers_per_block = 2  # residual blocks of a level; the decoder has one more
    config.model.norm_groups = 32
    config.model.use_quant_conv = True  # 1x1 convolutions between encoder, latents and decoder
    config.model.mid_attention = True  # over all positions of the smallest level
    config.model.dtype = "float32"  # of activations: float32, bfloat16
    config.model.remat = False  # recomputes the residual blocks in the backward pass


def _add_autoencoder(config):
    config.autoencoder = ConfigDict()  # the loss
    config.autoencoder.distance = "l1"  # to the reconstruction, mean over values: l1, l2
    config.autoencoder.kl_weight = 1e-6  # of the KL per value; 1e-6 as in latent diffusion
    config.autoencoder.lpips_weight = 0.0  # of LPIPS; 1 as in latent diffusion
    config.autoencoder.lpips = ""  # workdir of LPIPS's weights, for lpips_weight > 0

    config.latents = ConfigDict()
    config.latents.source = "pixels"  # an autoencoder is trained on images


def _size(side):
    """Returns a value that may also be set to (height, width)."""
    return config_dict.FieldReference(side, field_type=object)
