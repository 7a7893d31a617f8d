"""Block sizes of the TPU kernels that took the fewest cycles, by the compiler's schedule."""

MADE = {}
SIZES = {
    "v5e": {(256, False): {512: (1024, 1024, 128, 256)}, (256, True): {512: (1024, 1024, 128, 256)}}
}
