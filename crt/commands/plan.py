"""`python -m crt plan`: what a params file costs on a cluster, before anything runs.

FLOPs and parameters are counted, memory is derived (see `crt.ar.memory`), hours rest on the share of the peak rate
that is assumed: give your own measured one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from crt.errors import UserError
from crt.params import Params, load_params
from crt.progress import human_bytes as _size

# Assumed shares of the peak rate. Measured on one H200 (benchmarks/stage1.md, stage2.md, tokens.md): stage 2 of 775M
# 0.40, stage 1 without LPIPS 0.27, encoding 0.27 of TF32; less here for several GPUs and LPIPS. The paper's stage 2
# reached 0.15 and its stage 1 0.10 (84 and 72 hours on 8 A100).
_MFU = {"train_ar": 0.35, "train_tokenizer": 0.20}
# Drawing code by code reads all weights for each: far below what training reaches.
_MFU_SAMPLE = 0.05
# JPEG images of ImageNet's size that one host decodes per second, with some 16 cores.
_IMAGES_PER_SECOND = 1500.0
# In seconds.
_HALF_A_MINUTE = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the params file, the cluster and what is assumed."""
    parser.add_argument("--params", type=Path, metavar="FILE", default=Path("params.yaml"), help="default: %(default)s")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="a100, h100, h200, ...; default: %(default)s")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="of one GPU, instead of the named one's")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="of one GPU, likewise, in every precision")
    parser.add_argument("--reserve", type=float, default=4.0, metavar="GB", help="set aside on each GPU for CUDA, NCCL and fragmentation; default: %(default)s")  # fmt: skip  # noqa: E501
    parser.add_argument("--mfu", type=float, default=_MFU["train_ar"], help="assumed share of the peak rate, train_ar; default: %(default)s")  # fmt: skip  # noqa: E501
    parser.add_argument("--mfu-tokenizer", type=float, default=_MFU["train_tokenizer"], help="likewise, tokenizer and evaluation; default: %(default)s")  # fmt: skip  # noqa: E501
    parser.add_argument("--mfu-sample", type=float, default=_MFU_SAMPLE, help="likewise, sampling; default: %(default)s")  # fmt: skip  # noqa: E501
    parser.add_argument("--images-per-second", type=float, default=_IMAGES_PER_SECOND, help="that the host decodes in prepare_data; default: %(default)s")  # fmt: skip  # noqa: E501
    parser.add_argument("--images", type=int, metavar="N", help="in the data set, where the source does not tell")
    parser.add_argument("--classes", type=int, metavar="N", help="likewise")
    parser.add_argument("--model", metavar="SIZE", help="a named size instead of train_ar.model's: see --models")
    parser.add_argument("--batch-size", type=int, metavar="N", help="instead of train_ar.batch_size")
    parser.add_argument("--models", action="store_true", help="print all named sizes for these params, and end")


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns 0 if the run of the params fits, else 1.

    Raises:
        UserError: bad params or options, a batch of either training that does not divide among the GPUs.
    """
    from crt.data.sampler import rank_slice
    from crt.plan.cluster import check_within, make_cluster
    from crt.plan.layouts import layouts
    from crt.plan.sampling_memory import sampling_memory
    from crt.plan.tokenizer_memory import tokenizer_memory
    from crt.plan.work import ar_config, data_size, stage_work

    params = _with_options(load_params(args.params), args)
    data = data_size(params, args.images, args.classes)
    if args.models:
        _print_models(params, data.classes)
        return 0
    for option, share in (("mfu", args.mfu), ("mfu-tokenizer", args.mfu_tokenizer), ("mfu-sample", args.mfu_sample)):
        check_within(f"--{option}", share, most=1)
    check_within("--images-per-second", args.images_per_second)
    cluster = make_cluster(args.gpu, args.gpus, args.gpu_memory, args.peak, args.reserve)
    try:
        rank_slice(params.train_tokenizer.batch_size, 0, cluster.gpus)  # as the stage will
    except UserError as error:
        raise UserError(f"train_tokenizer.{error}") from None
    config = ar_config(params, data.classes)
    ways = list(layouts(params.train_ar, config, cluster))
    peaks = cluster.peak_flops

    print(
        f"{args.params} on {cluster.gpus} x {cluster.name}: {cluster.memory_bytes / 1e9:g} GB, "
        f"{peaks['bf16'] / 1e12:g} TFLOPS in bf16, {peaks['float32'] / 1e12:g} in float32, each"
    )
    _print_sizes(params, config, data)
    _print_hours(args, stage_work(params, data, config), cluster, data)
    stage1 = tokenizer_memory(params.train_tokenizer, params.lambda_ > 0, cluster.gpus)
    _print_tokenizer_memory(stage1, cluster)
    _print_memory(ways, cluster, params.train_ar.compile)
    sampling = sampling_memory(params, config)
    _print_sampling_memory(sampling, params.sample.batch_size, cluster)
    return _print_verdict(
        _tokenizer_misfit(stage1, cluster),
        _sampling_misfit(sampling, params.sample.batch_size, cluster),
        _training_misfit(ways, cluster, params.train_ar.compile),
    )


def _with_options(params: Params, args: argparse.Namespace) -> Params:
    """Params with what the options of stage 2 replace; its learning rate stays."""
    from crt.ar.sizes import resized

    changes: dict[str, Any] = {}
    if args.model:
        changes["model"] = resized(params.train_ar.model, args.model)
    if args.batch_size is not None:
        if args.batch_size < 1:
            raise UserError(f"--batch-size {args.batch_size}: must be greater than 0")
        changes["batch_size"] = args.batch_size
    return params.model_copy(update={"train_ar": params.train_ar.model_copy(update=changes)})


def _print_models(params: Params, classes: int) -> None:
    """All named sizes with their parameter counts, as blocks to copy into train_ar.model."""
    from crt.ar.model import count_parameters
    from crt.ar.sizes import named_sizes, resized
    from crt.plan.work import ar_config

    print(f"{'size':6} {'parameters':>15}   keys of train_ar.model")
    for name, size in named_sizes().items():
        stage2 = params.train_ar.model_copy(update={"model": resized(params.train_ar.model, name)})
        config = ar_config(params.model_copy(update={"train_ar": stage2}), classes)
        block = ", ".join(f"{key}: {value}" for key, value in size.items())
        print(f"{name:6} {count_parameters(config):15,}   {{{block}}}")


def _print_sizes(params: Params, config: Any, data: Any) -> None:
    from crt.ar.model import count_parameters
    from crt.plan.work import cache_bytes, checkpoint_bytes, tokenizer_flops, views_text

    stage2, parameters = params.train_ar, count_parameters(config)
    checkpoint = checkpoint_bytes(config, stage2.precision, stage2.zero_stage)
    kept = stage2.keep_checkpoints + 1
    lines = {
        "tokenizer": f"{tokenizer_flops(params)[2]:,} parameters",
        "train_ar.model": f"{parameters:,} parameters, {config.layers} layers, {config.heads} heads, width "
        f"{config.width}, feed-forward {config.ffn_width}",
        "codes": f"{config.num_tokens} per image ({config.grid[0]} x {config.grid[1]}) of {config.codebook_size:,}",
        "token cache": f"{_size(cache_bytes(params, data, config))}: {data.train:,} images in {views_text(params)}, "
        f"{data.val:,} in 1",
        "checkpoint": f"{_size(checkpoint)}, at most {kept} at once: {_size(kept * checkpoint)}"
        if stage2.steps
        else "none: nothing is trained",
        "finished model": f"{_size(4 * parameters)} in float32",
    }
    for name, text in lines.items():
        print(f"  {name:15} {text}")


def _print_hours(args: argparse.Namespace, stages: Any, cluster: Any, data: Any) -> None:
    print(f"\n{'stage':16} {'FLOPs':>10} {'MFU':>5} {'':9}{'hours':>10} {'GPU-hours':>10}")
    hours = (data.train + data.val) / args.images_per_second / 3600
    print(f"{'prepare_data':16} {'-':>10} {'-':>5} {'':9}{_time(hours):>10} {'-':>10}  the host decodes {args.images_per_second:g} images/s")  # fmt: skip  # noqa: E501
    total, on_gpus = hours, 0.0
    for work in stages:
        mfu = {"train_ar": args.mfu, "sample": args.mfu_sample}.get(work.stage, args.mfu_tokenizer)
        per_hour = cluster.peak_flops[work.precision] * mfu * 3600
        hours = ((work.flops - work.alone) / cluster.gpus + work.alone) / per_hour
        total += hours
        on_gpus += hours
        print(
            f"{work.stage:16} {work.flops:10.3e} {mfu:5.0%} {work.precision:9}{_time(hours):>10} {_time(hours * cluster.gpus):>10}  {work.text}"  # noqa: E501
        )
    print(f"{'all':16} {'':>10} {'':>5} {'':9}{_time(total):>10} {_time(on_gpus * cluster.gpus):>10}")
    print("hours = FLOPs / (GPUs x peak x MFU); the MFU is assumed (--mfu...)")


def _print_tokenizer_memory(memory: Any, cluster: Any) -> None:
    available = cluster.available_bytes
    largest = cluster.gpus * memory.largest(available)
    print(
        f"\ntrain_tokenizer's memory per GPU, derived, not measured; {_size(available)} after the reserve:\n"
        f"  {_size(memory.peak)}{_mark(memory.peak, cluster)} at {memory.images} images at once: "
        f"networks and optimizers {_size(memory.state)}, {_size(memory.per_image)} per image; "
        f"largest batch_size {largest or 'none'}"
    )


def _print_memory(ways: Any, cluster: Any, compiled: bool) -> None:
    micro = ways[0].micro_batch
    print(
        f"\ntrain_ar's memory per GPU, likewise:\n"
        f"{'':2}{'ZeRO':5}{'offload':25}{'recompute':10}{'weights':>9}{'gradients':>10}{'optimizer':>10}"
        f"{'per image':>10}{f'peak at {micro}':>13}{'largest micro-batch':>20}{'host':>9}"
    )
    for way in ways:
        m = way.memory
        print(
            f"{'>' if way.chosen else '':2}{way.split.zero_stage:<5}{way.split.offload:25}"
            f"{'yes' if way.split.activation_checkpointing else 'no':10}{_size(m.weights):>9}{_size(m.gradients):>10}"
            f"{_size(m.optimizer):>10}{_size(m.activations_per_image):>10}{_size(way.peak_bytes) + _mark(way.peak_bytes, cluster):>13}"  # noqa: E501
            f"{way.largest or 'does not fit':>20}{_size(m.host):>9}"
        )
    print("> as in the params; ! more than a GPU has; recompute: train_ar.activation_checkpointing; host: per process")
    if compiled:
        print("ZeRO 3 needs train_ar.compile: false")


def _print_sampling_memory(memory: Any, batch_size: int, cluster: Any) -> None:
    peak = memory.peak(batch_size)
    print(
        f"\nsample's memory per GPU, likewise: {_size(peak)}{_mark(peak, cluster)} at {batch_size} images at once\n"
        f"  weights {_size(memory.weights)}, keys and values {_size(memory.cache_per_image)} per image, decoding "
        f"{_size(memory.decode)}; largest batch {memory.largest_batch(cluster.available_bytes)}"
    )


def _mark(peak: int, cluster: Any) -> str:
    return " !" if peak > cluster.available_bytes else ""


def _print_verdict(*misfits: str | None) -> int:
    """Print what does not fit and its remedy, or that all fits; returns the exit status."""
    found = [misfit for misfit in misfits if misfit]
    for misfit in found or ["fits: train_tokenizer, train_ar and sample as the params have them"]:
        print(misfit)
    return 1 if found else 0


def _tokenizer_misfit(memory: Any, cluster: Any) -> str | None:
    available = cluster.available_bytes
    if memory.peak <= available:
        return None
    largest = cluster.gpus * memory.largest(available)
    fewer = f"set train_tokenizer.batch_size to {largest} or less, or use more GPUs"
    remedy = fewer if largest else "use GPUs with more memory"
    return f"does not fit: train_tokenizer needs {_size(memory.peak)} of {_size(available)}: {remedy}"


def _sampling_misfit(memory: Any, batch_size: int, cluster: Any) -> str | None:
    peak, available = memory.peak(batch_size), cluster.available_bytes
    if peak <= available:
        return None
    largest = memory.largest_batch(available)
    remedy = f"set sample.batch_size to {largest} or less" if largest else "use GPUs with more memory"
    return f"does not fit: sample needs {_size(peak)} of {_size(available)}: {remedy}"


def _training_misfit(ways: Any, cluster: Any, compiled: bool) -> str | None:
    chosen = next(way for way in ways if way.chosen)
    if chosen.peak_bytes <= cluster.available_bytes:
        return None
    needs = f"does not fit: train_ar needs {_size(chosen.peak_bytes)} of {_size(cluster.available_bytes)}"
    if chosen.largest:
        return f"{needs}: set train_ar.micro_batch_size to {chosen.largest} or less"
    others = [way for way in ways if way.largest]
    if not others:
        return f"{needs}: in no way that is listed: use more or larger GPUs"
    # The first that fits does the least extra work.
    best = min(others, key=lambda way: (way.split.offload != "none", way.split.activation_checkpointing))
    # Params that compile under ZeRO 3 are refused.
    uncompiled = ", compile to false" if compiled and best.split.zero_stage == 3 else ""
    return (
        f"{needs}: set train_ar.zero_stage to {best.split.zero_stage}{uncompiled}, offload to {best.split.offload}, "
        f"activation_checkpointing to {str(best.split.activation_checkpointing).lower()} and micro_batch_size to "
        f"{best.largest} or less"
    )


def _time(hours: float) -> str:
    """Hours in three digits; what takes less than half a minute in seconds, with their unit."""
    seconds = 3600 * hours
    if seconds >= _HALF_A_MINUTE:
        return f"{float(f'{hours:.3g}'):,.15g}"  # no powers of ten
    return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
