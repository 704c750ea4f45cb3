"""GPUs by name, and the cluster that a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass

from crt.errors import UserError

GB = 10**9


@dataclass(frozen=True)
class Gpu:
    """What the maker states: memory, and dense rates of the matrix units."""

    memory_gb: float
    bf16_tflops: float
    """Dense, summed in float32."""
    float32_tflops: float
    """Without TF32."""

    @property
    def tf32_tflops(self) -> float:
        """In which PyTorch's float32 convolutions run by default; its matrix products do not."""
        return self.bf16_tflops / 2


# Data sheets of the makers.
GPUS = {
    "a100-40": Gpu(40, 312, 19.5),
    "a100": Gpu(80, 312, 19.5),
    "h100": Gpu(80, 989, 67),
    "h200": Gpu(141, 989, 67),
    "b200": Gpu(180, 2250, 75),
    "l40s": Gpu(48, 362, 91.6),
    "rtx4090": Gpu(24, 165, 82.6),
    "rtx5090": Gpu(32, 209, 105),
}


@dataclass(frozen=True)
class Cluster:
    """What the plan divides the work by."""

    name: str
    gpus: int
    memory_bytes: int
    """Of one GPU."""
    peak_flops: dict[str, float]
    """Of one GPU, per second, by precision."""
    reserve_bytes: int
    """Of one GPU, for CUDA's context, NCCL and fragmentation."""

    @property
    def available_bytes(self) -> int:
        """Of one GPU, for the run's tensors."""
        return self.memory_bytes - self.reserve_bytes


def make_cluster(
    name: str, gpus: int, memory_gb: float | None, peak_tflops: float | None, reserve_gb: float
) -> Cluster:
    """A named GPU so many times, with own figures where given; one own peak rate holds in every precision.

    Raises:
        UserError: no GPU has that name, or a figure is none that one could have.
    """
    if name not in GPUS:
        raise UserError(f"--gpu {name}: unknown: use one of {', '.join(GPUS)}, or --gpu-memory and --peak with any")
    gpu = GPUS[name]
    peaks = {"bf16": gpu.bf16_tflops, "TF32": gpu.tf32_tflops, "float32": gpu.float32_tflops}
    if peak_tflops is not None:
        peaks = dict.fromkeys(peaks, peak_tflops)
    memory = gpu.memory_gb if memory_gb is None else memory_gb
    check_within("--gpus", gpus, least=1)
    check_within("--gpu-memory", memory)
    check_within("--peak", peaks["bf16"])
    if not 0 <= reserve_gb < memory:
        raise UserError(f"--reserve {reserve_gb}: must be 0 or more, and less than the GPU's {memory:g} GB")
    own = "" if memory_gb is None and peak_tflops is None else " with own figures"
    flops = {precision: peak * 1e12 for precision, peak in peaks.items()}
    return Cluster(name + own, gpus, round(memory * GB), flops, round(reserve_gb * GB))


def check_within(option: str, value: float, *, least: float = 1e-6, most: float = 1e9) -> None:
    """Refuse what no cluster has, and what sums and quotients would overflow with.

    Raises:
        UserError: the value is not within the bounds.
    """
    if not least <= value <= most:
        raise UserError(f"{option} {value}: must be from {least:g} to {most:g}")
