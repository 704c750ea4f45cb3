"""The figures that an evaluation writes into metrics.json: when it does, their names and what they mean. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crt.params import MS_SSIM_MIN_SIDE, Params


@dataclass(frozen=True)
class Metric:
    """What is known of a figure without a run."""

    what: str = ""
    """What it is; "" for one that tables of results leave out."""
    better: Literal["", "lower", "higher"] = ""
    """Which of its values; "" where that goes without saying."""
    more: str = ""
    """What else a reader must know, other figures in braces."""
    title: str = ""
    """Its name for people, if that is not its key."""
    axis: str = ""
    """Its name on an axis, which says besides of which images and in which unit, if the title does not."""
    unit: Literal["", "%", "dB"] = ""
    """Of its value on a page; "%" for a share, between 0 and 1."""
    needs: Literal["", "inception", "classifier", "lpips", "large images", "small images"] = ""
    """Of the params, without which it is not measured."""

    @property
    def meaning(self) -> str:
        """What a table of results says of it."""
        return f"{self.what}{self.better and f', {self.better} is better'}{self.more}"


# In the order in which a reader wants them.
METRICS = {
    "rfid": Metric("FID of reconstructions", "lower", title="rFID", needs="inception"),
    "fd_classifier_rec": Metric(
        "classifier distance of reconstructions", "lower", title="classifier distance of reconstructions",
        needs="classifier",
    ),
    "gfid": Metric(
        "FID of samples", "lower", "; {gfid_of_perfect_images:.3g} for perfect ones", title="gFID", needs="inception"
    ),
    "gfid_of_perfect_images": Metric(needs="inception"),
    "fd_classifier_gen": Metric(
        "classifier distance of samples", "lower", "; {fd_classifier_gen_of_perfect_images:.3g} for perfect ones",
        title="classifier distance of samples", needs="classifier",
    ),
    "fd_classifier_gen_of_perfect_images": Metric(needs="classifier"),
    "sfid": Metric(
        "FID of samples by the layout of their parts", "lower", "; {sfid_of_perfect_images:.3g} for perfect ones",
        title="sFID", needs="inception",
    ),
    "sfid_of_perfect_images": Metric(needs="inception"),
    "kid": Metric(
        "kernel distance of samples", "lower", "; perfect ones score 0, give or take chance",
        title="KID", needs="inception",
    ),
    "kd_classifier_gen": Metric(
        "kernel distance of samples", "lower", "; perfect ones score 0, give or take chance",
        title="kernel distance of samples", needs="classifier",
    ),
    "inception_score": Metric("of samples", "higher", title="Inception score", needs="inception"),
    "inception_score_std": Metric(needs="inception"),
    "precision": Metric("share of samples that look like real images", "higher", unit="%"),
    "recall": Metric("share of real images whose like is among the samples", "higher", unit="%"),
    "class_agreement": Metric(
        "share of samples recognised as the class asked for", more="; real images: {classifier_accuracy:.4g}",
        title="agreement with the class", axis="share of samples recognised as their class", unit="%",
    ),
    "classifier_accuracy": Metric(unit="%"),
    "psnr": Metric("dB, reconstructions", "higher", title="PSNR", axis="PSNR of reconstructions (dB)", unit="dB"),
    "ms_ssim": Metric("reconstructions", "higher", ", 1 at most", title="MS-SSIM", needs="large images"),
    "ssim": Metric("reconstructions", "higher", ", 1 at most", title="SSIM", needs="small images"),
    "lpips": Metric("reconstructions", "lower", title="LPIPS", needs="lpips"),
    "codebook_usage": Metric("share of codes in use", axis="share of codes in use", unit="%"),
    "codebook_perplexity": Metric(),
    "bits_per_image": Metric(
        "bits, as stored", more="; {bits_per_image_stage2:.4g} by the transformer's predictions",
        axis="bits per image, as stored",
    ),
    "bits_per_image_entropy": Metric(axis="bits per image, by the codes' frequencies"),
    "bits_per_image_stage2": Metric(axis="bits per image, by the transformer's predictions"),
    "stage2_val_loss": Metric(
        "nats per code, how hard the codes are to predict", "lower",
        title="stage 2 loss", axis="validation loss of stage 2 (nats per code)",
    ),
    "stage1_training_flops": Metric(axis="training FLOPs of stage 1"),
    "stage2_training_flops": Metric(axis="training FLOPs of stage 2"),
    # What the others were measured by, and of.
    **dict.fromkeys((
        "tokens_per_image", "guidance_scale", "features_image_size", "reconstruction_reference_images",
        "generation_reference_images", "generation_images", "neighbours", "kernel_subsets", "kernel_subset_size",
        "pairwise_images", "inception_score_splits",
    ), Metric()),
}  # fmt: skip
# Those that tables of results show.
RESULTS = {name: metric.meaning for name, metric in METRICS.items() if metric.what}
# What the results of a study have besides.
_OF_STUDIES = {"training_flops": Metric(axis="training FLOPs of both stages")}


def figure_names(params: Params) -> list[str]:
    """The figures of an evaluation with these params.

    Few images, or other weights of Inception, may yet cost it the kernel distance, precision and recall, or sFID.
    """
    side = params.evaluate.image_size or params.train_tokenizer.image_size
    met = {"", params.evaluate.features, "large images" if side >= MS_SSIM_MIN_SIDE else "small images"}
    met |= {"lpips"} if params.evaluate.lpips else set()
    return [name for name, metric in METRICS.items() if metric.needs in met]


def higher_is_better(name: str) -> bool:
    """Whether a figure is the better the higher it is, as shares are, of which that goes without saying."""
    metric = METRICS.get(name, Metric())
    return metric.better == "higher" or (not metric.better and metric.unit == "%")


def title(name: str) -> str:
    """A figure's name for people."""
    return METRICS.get(name, Metric()).title or name.replace("_", " ")


def description(name: str) -> str:
    """What a figure is and which of its values are better, for a page without a run's other figures."""
    better = "higher" if higher_is_better(name) else METRICS.get(name, Metric()).better
    return f"{axis_title(name)}{better and f'; {better} is better'}"


def axis_title(name: str) -> str:
    """A figure of metrics.json as a picture names it."""
    return (METRICS | _OF_STUDIES).get(name, Metric()).axis or title(name)
