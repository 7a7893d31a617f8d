"""Block sizes of the TPU kernels that took the fewest cycles, by the compiler.

Made, chip by chip, by

    python -m kernels.inspect attention --tune --target v5e > tuned.py

(``tune.py`` says how): causal, bfloat16, at the lengths below. No chip was there.
"""

MADE = {
    "v6e": (
        "blocks of 512, 1024, chunks of 128, 256",
        "libtpu 0.0.42.1, jax 0.10.2, 2026-11-21",
    ),
}

# chip -> (width of heads, whether there is a relative bias) -> length ->
# most of a block forward and backward, queries of a chunk within it forward and backward
SIZES = {
    "v5e": {
        (256, False): {
            512: (1024, 1024, 128, 256),
        },
        (256, True): {
            512: (1024, 1024, 128, 256),
        },
    },
    "v6e": {
        (64, False): {
            512: (512, 512, 256, 256),
            1024: (1024, 1024, 256, 256),
            2048: (1024, 1024, 256, 256),
            4096: (1024, 1024, 256, 256),
            8192: (1024, 1024, 256, 256),
        },
        (64, True): {
            512: (512, 512, 256, 256),
            1024: (1024, 1024, 256, 256),
            2048: (1024, 1024, 256, 256),
            4096: (1024, 1024, 256, 256),
            8192: (1024, 1024, 256, 256),
        },
        (128, False): {
            512: (512, 512, 256, 256),
            1024: (1024, 1024, 256, 256),
            2048: (1024, 1024, 256, 256),
            4096: (1024, 1024, 256, 256),
            8192: (1024, 1024, 256, 256),
        },
        (128, True): {
            512: (512, 512, 256, 256),
            1024: (1024, 1024, 256, 256),
            2048: (1024, 1024, 256, 256),
            4096: (1024, 1024, 256, 256),
            8192: (1024, 1024, 256, 256),
        },
    },
}
