"""Know every tolerance of the tests, each with its reason."""

from __future__ import annotations

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

# A float32 view cut from a batch whose largest image differs: matrix products over a longer padded axis may group the
# same terms otherwise. In a dataset of one size the views are equal to the bit.
FLOAT32_PADDING = 1e-5

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
