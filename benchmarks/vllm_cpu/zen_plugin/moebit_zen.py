"""A platform plugin for vLLM: its AMD Zen platform on any x86 machine with AVX-512.

zentorch's kernels for grouped 4-bit experts run there, vLLM on its own uses them on AMD processors only.
"""


def platform() -> str:
    import zentorch  # noqa: F401 - registers the kernels

    return "vllm.platforms.zen_cpu.ZenCpuPlatform"
