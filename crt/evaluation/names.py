"""Names of the figures that an evaluation writes into metrics.json, from the params alone: no torch, no run."""

from __future__ import annotations

from crt.params import MS_SSIM_MIN_SIDE, Params

_OF_INCEPTION = (
    "rfid",
    "gfid",
    "gfid_of_perfect_images",
    "sfid",
    "sfid_of_perfect_images",
    "kid",
    "inception_score",
    "inception_score_std",
)
_OF_CLASSIFIER = ("fd_classifier_rec", "fd_classifier_gen", "fd_classifier_gen_of_perfect_images", "kd_classifier_gen")
_OF_IMAGES = ("psnr", "ssim", "ms_ssim", "lpips")
_ALWAYS = (
    "precision",
    "recall",
    "codebook_usage",
    "codebook_perplexity",
    "tokens_per_image",
    "bits_per_image",
    "bits_per_image_entropy",
    "bits_per_image_stage2",
    "stage2_val_loss",
    "class_agreement",
    "classifier_accuracy",
    "stage1_training_flops",
    "stage2_training_flops",
    "features_image_size",
    "reconstruction_reference_images",
    "generation_reference_images",
    "generation_images",
    "guidance_scale",
    "neighbours",
    "kernel_subsets",
    "kernel_subset_size",
    "pairwise_images",
    "inception_score_splits",
)
ALL_FIGURES = (*_OF_INCEPTION, *_OF_CLASSIFIER, *_OF_IMAGES, *_ALWAYS)


def figure_names(params: Params) -> list[str]:
    """The figures of an evaluation with these params.

    Few images, or other weights of Inception, may yet cost it the kernel distance, precision and recall, or sFID.
    """
    side = params.evaluate.image_size or params.train_tokenizer.image_size
    structural = "ms_ssim" if side >= MS_SSIM_MIN_SIDE else "ssim"
    perceptual = ["lpips"] if params.evaluate.lpips else []
    distances = _OF_INCEPTION if params.evaluate.features == "inception" else _OF_CLASSIFIER
    return [*distances, "psnr", structural, *perceptual, *_ALWAYS]
