"""Tolerances of the tests, each with its reason."""

from __future__ import annotations

import torch

# Float64 results of a few dozen operations on numbers up to 1: 2**-52 times the count, with room for cancellation.
FLOAT64 = 1e-13

# One float32 view operation against float64: 2**-24 a rounding; contrast, blur and the two matrix products of a crop
# accumulate about ten of them on numbers up to 1, and normalisation divides by a std of 0.22.
FLOAT32_OP = 2e-6

# Float32 hue and saturation divide by chroma: an absolute error of 2**-24 in a channel turns the hue of a nearly gray
# pixel, but the result is scaled by chroma again, so the error stays a small multiple of 2**-24.
FLOAT32_HSV = 4e-6

# A whole float32 view against float64, normalised: errors of four jitter operations in a row (contrast up to 1.4 each
# way, hue sextants), divided by a std of 0.22. Solarize jumps only in slope at 1/2, so it does not amplify.
FLOAT32_VIEW = 1e-4

# Five Newton-Schulz steps in float32, each three matrix products of some hundred terms of 2**-24, through a quintic of
# slope 3.4 at 0: the smallest singular values grow 300 times, and so does what was rounded.
FLOAT32_ORTHOGONAL = 1e-3

# A float32 view cut from a batch whose largest image differs: matrix products over a longer padded axis may group the
# same terms otherwise. In a dataset of one size the views are equal to the bit.
FLOAT32_PADDING = 1e-5

# A view made by the kernels in float32, normalised, against float64: as FLOAT32_VIEW, measured ten times below this. A
# GPU divides to 2 ulp and takes exponentials to 2**-22, of which blur's weights are quotients.
FLOAT32_KERNEL_VIEW = 2e-5

# Planes between the kernels in float16, each rounding 2**-12 in [0, 1], divided by a std of 0.22: three roundings, the
# first made up to 3 times larger by contrast 1.4, saturation 1.2 and hue. A step of the source's 256 levels is 0.017.
FLOAT16_PLANES = 8e-3

# Pillow resizes float images in float32 with weights in float64: rounding of two passes over values up to 1.
PILLOW = 1e-6

# Kolmogorov-Smirnov distance of n draws: P(distance > 1.95 / sqrt(n)) < 0.001. Seeds are fixed, so a pass stays a pass.
KOLMOGOROV_SMIRNOV = 1.95

# A binomial count may leave its mean by this many standard deviations: two-sided probability 6e-5 a check.
BINOMIAL_SIGMAS = 4.0

# Chi-square over the 24 orders, 23 degrees of freedom: 0.999 quantile.
CHI_SQUARE_23 = 49.7

# Float64 formulas written two ways (batch norm per view, the loss): a few hundred roundings of 2**-53, sums up to 100.
FLOAT64_RTOL = 1e-10
FLOAT64_ATOL = 1e-12

# Five float64 steps against the naive trainer: such roundings amplified by 1/|z| in the normalisation, step after step.
NAIVE_STEPS_RTOL = 1e-8

# Loss of a small network in bfloat16 against float32: eight bits in every activation, averaged over a dozen images.
BF16_LOSS = 0.05

# Losses and parameters of up to twelve float32 steps on a GPU taken two ways, at a rate of 1e-3. On a CPU, relative
# noise of 6e-8 in every convolution moved the loss by 3e-5 and parameters by 1.3e-4 in seven such steps; a model that
# stands still is off by 6e-4 and 6e-3. No GPU has run these tests yet.
GPU_STEPS_RTOL = 5e-4

# Loss in float32 against float64: two rsqrt of 2**-22, sums of D squares of units by a tree, rows of loss up to 4.
FLOAT32_LOSS = 4e-6

# Its gradient, times |q| * B / 2 so that it is a combination of unit vectors: such roundings, none of them amplified.
FLOAT32_LOSS_GRADIENT = 4e-6

# A bfloat16 has 8 significant bits: one unit in the last place is at most this share of the number.
BF16_ULP = 2**-7

# A LARS step in float32 against float64, on numbers up to 5: four roundings of 2**-24 and a ratio of two norms to 1e-6.
FLOAT32_LARS = 3e-6

# Batch norm in float32 against float64, on results up to 10: a dozen roundings of 2**-24. Ten times that for the
# gradients of weight and bias, which are sums over up to a few hundred rows.
FLOAT32_BATCHNORM = 1e-5

# The same before the running mean follows a mean of 30 at a std of 2: (30 / 2)**2 such roundings in the variance.
FLOAT32_BATCHNORM_COLD = 3e-4

# One unit in the last place of a 16-bit float, as a share of the number.
HALF_ULPS = {torch.bfloat16: BF16_ULP, torch.float16: 2**-10}

# A gradient of nine float32 layers against float64, relative to its norm: each batch norm amplifies the roundings of
# the layers before it by the condition of its statistics, here over 32 to 256 values.
FLOAT32_NETWORK = 1e-4

# torchvision turns hue in float32 whatever it is given, HSV there and back: a dozen roundings of 2**-24, times 6.
TORCHVISION_HUE = 4e-6

# torchvision makes the taps of its Gaussian in float32 from float64 sigma: 2**-24 each, seven taps twice.
TORCHVISION_BLUR = 1e-6

# torchvision takes mean and std as float64 here, but ours are rounded once more by 1 / std and mean / std.
TORCHVISION_NORMALIZE = 1e-12

# Up to five float32 steps of a small network against float64, loss and parameters up to 2: a gradient of some thousand
# float32 roundings, divided by |z| in the normalisation, step after step.
KERNEL_STEPS = 1e-4

# The loss over twenty float32 steps whose sums several ranks took in another order: 1e-7 at the first step, which the
# learning rate's climb multiplies to 6e-4 by the twentieth on this set (measured with 2 and 3 ranks).
RANKS_LOSS = 5e-3

# A JPEG decoded by nvJPEG against libjpeg-turbo, in levels of 255. Without chroma to enlarge: both round the transform
# and the colours; libjpeg's own fast transform is up to 4 levels off. With it, on average over an image: the drawn
# waves decoded by libjpeg with repeated instead of interpolated chroma and the fast transform are up to 2.7 off. No GPU
# has been asked yet.
NVJPEG_LEVELS = 4
NVJPEG_MEAN_LEVELS = 4.0

# A uint8 image resized by torch against float64 with a rounding between the two passes: half a level for the last
# rounding, and a level where weights of 16 bits round the first pass to the other side.
RESIZED_LEVELS = 2.0
