"""The text of a study says what its fits do."""

from experiments.scaling.fits import summary

LINE = dict(slope=-0.5, slope_interval=(-0.75, -0.25), correlation=-0.9, of_params=-0.8, points=12)
LARGEST = dict(model="XL/2", gmacs=4.0, reach=2.0, step=1_000, predicted=0.21, measured=0.2)
LARGEST |= dict(interval=(0.19, None), relative_error=0.05)
LAW = dict(x="gmacs", a=0.1, b=2.0, c=0.3, points=12)
SLOPES = dict(step=1_000, mean=-0.1, mean_per_gmacs=-0.05)
SLOPES |= dict(groups=[dict(models=["S/4", "S/2"], slope=-0.1)])
S, L = dict(model="S/4", depth=2, tokens=1, q=0.5), dict(model="L/2", depth=8, tokens=16, q=0.4)
UNET = dict(model="U", depth=None, tokens=None, q=0.4)


TEXT = """\
q: 24 rows, 6 models, 2 seeds, steps 500, 1,000. Intervals are of 95%, over models.

Against compute of a pass
  q = intercept + slope log10(gmacs), at equal steps
  step      1,000: slope -0.5 (-0.75 to -0.25), correlation -0.9000 (of log params -0.8000), 12 runs

Power law of models at equal steps
  q = 0.1 + 2 gmacs^-0.3, 12 points at step 1,000
  exponent ? to 0.5; at infinite compute 0 to 0.2

Power law of the best quality at each training compute
  q = 0.1 + 2 train_gflops^-0.3, 12 points
  no intervals: chosen

The largest model, predicted by the others
  XL/2 (4 gmacs, 2 x the next) at step 1,000: predicted 0.21 (0.19 to ?), measured 0.2 (+5.0%)

Predictions beyond the models fitted, errors
  1 to 2 x beyond: 2.0% on average, -3.0% at worst, of 2
  2 to 4 x beyond: 10.0% on average, +10.0% at worst, of 1
  over 16 x beyond: 20.0% on average, +20.0% at worst, of 1

Of one number of tokens alone
  1 token: slope -0.5 (-0.75 to -0.25), correlation -0.9000 (of log params -0.8000), 12 runs
    few.
  16 tokens: one.
    XL/2 (4 gmacs, 2 x the next) at step 1,000: predicted 0.21 (0.19 to ?), measured 0.2 (+5.0%)
    1 to 2 x beyond: 10.0% on average, +10.0% at worst, of 1

Equal training compute
  3e+03 GFLOPs, 16 tokens: best of 3 M/2; optimum 0.5 gmacs, 2e+06 parameters
  50 GFLOPs, 4 tokens: best of 3 S/4; no optimum between the models
  fewer than 3 optima: no exponent

Slope of log quality against log tokens
  mean -0.100, and against log gmacs -0.050
  mean at each step: -0.200 at 500, -0.100 at 1,000
  of each group at step 1,000, smaller models first
  -0.100  S/4, S/2

Slope of log quality against log depth
  mean -0.100, and against log gmacs -0.050
  of each group at step 1,000, smaller models first
  -0.100  S/4, S/2

Equal compute of a pass, other tokens
  at step 1,000; deviation between seeds: 16 tokens 1.00%
  U 0.4, L/2 (depth 8, 16 tokens) 0.4, at 0.90 x the gmacs: L/2 is better, 2.5 deviations
  U 0.4, L/2 (depth 8, 16 tokens) 0.4, at 0.90 x the gmacs: not told apart, 1.5 deviations
  U 0.4, L/2 (depth 8, 16 tokens) 0.4, at 0.90 x the gmacs: L/2 is better

Left out
  Slope of log quality against log width: no widths.
  Equal parameters and tokens, other depth: no pairs."""


def _rolling(*pairs):
    return dict(predictions=[dict(reach=reach, relative_error=error) for reach, error in pairs])


def test_text_of_a_study():
    of_tokens = [
        dict(tokens=1, line=LINE, largest=dict(left_out="few."), rolling=dict(left_out="few.")),
        dict(tokens=16, line=dict(left_out="one."), largest=LARGEST, rolling=_rolling((2.0, 0.1))),
    ]
    optimum = dict(tokens=16, budget=3e3, best="M/2", models=[1, 2, 3], bracketed=True)
    edge = optimum | dict(tokens=4, budget=50.0, best="S/4", bracketed=False)
    iso_flop = dict(budgets=[optimum | dict(gmacs=0.5, params=2e6), edge], exponents=[])
    pairs = dict(step=1_000, cost="gmacs", noise=[dict(tokens=16, deviation=0.01)])
    pair = dict(pair=[UNET, L], ratio=0.9, better="L/2")
    pairs["pairs"] = [pair | dict(deviations=at) for at in (-2.5, 1.5, None)]
    study = dict(quality="q", rows=24, models=6, seeds=2, steps=[500, 1_000], level=0.95)
    study |= dict(
        line=dict(steps=[LINE | dict(step=1_000)]),
        law=LAW | dict(step=1_000, a_interval=(0.0, 0.2), c_interval=(None, 0.5)),
        law_of_frontier=LAW | dict(x="train_gflops", no_intervals="chosen"),
        largest=LARGEST,
        rolling=_rolling((1.5, 0.01), (2.0, -0.03), (3.0, 0.1), (16.5, 0.2)),
        within_tokens=dict(groups=of_tokens),
        iso_flop=iso_flop,
        tokens=SLOPES | dict(by_step=[dict(step=500, mean=-0.2), dict(step=1_000, mean=-0.1)]),
        depth=SLOPES | dict(by_step=[dict(step=1_000, mean=-0.1)]),
        hidden_size=dict(left_out="no widths."),
        equal_gmacs=pairs,
        equal_params=dict(left_out="no pairs."),
    )
    assert summary.format_study(study) == TEXT


def test_text_of_networks_names_what_a_dit_is_built_of():
    found = dict(step=10, cost="gmacs", noise=[])
    found["pairs"] = [dict(pair=[S, UNET], ratio=1.0, better="U", deviations=None)]
    assert summary.format_networks(found, "q") == (
        "at step 10; deviation between seeds: not known\n"
        "S/4 (depth 2, 1 token) 0.5, U 0.4, at 1.00 x the gmacs: U is better"
    )
