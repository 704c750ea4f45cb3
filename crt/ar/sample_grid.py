"""Samples that a person looks at while stage 2 trains."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from crt.ar.generator import Generator
from crt.ar.model import ARTransformer
from crt.data.transforms import to_uint8
from crt.distributed import World, said_by_main
from crt.errors import UserError
from crt.pictures import image_grid
from crt.pipeline import load_stages
from crt.progress import logger
from crt.stage import StageRun
from crt.tokenizer.model import Tokenizer
from crt.tokens.layout import content_of

# LlamaGen's for its smaller models; the picture is for looking at, the stage `sample` has its own.
_GUIDANCE = 2.0


class SampleGrid:
    """Draws the first few classes from the model as it stands.

    Args:
        run: of train_ar; the cache's own tokenizer decodes, where its folder is found.
        num_images: of the picture; 0 draws none.
        world: all processes draw together, as ZeRO 3 needs; rank 0 decodes.
    """

    def __init__(self, run: StageRun, num_images: int, class_names: list[str], world: World) -> None:
        self.num_images, self.class_names, self.world, self.seed = num_images, class_names, world, run.params.seed
        # Without dropped labels the model learns no unconditional prediction.
        self.guidance = _GUIDANCE if run.params.train_ar.model.label_dropout > 0 else 1.0
        folder = find_tokenizer(run) if num_images else None
        self.enabled = bool(said_by_main(folder is not None, world))
        self.tokenizer = Tokenizer.load(folder, world.device) if folder is not None and world.is_main else None
        if num_images and not self.enabled and world.is_main:
            logger.info("train_ar: draws no samples: the tokenizer that made the codes is not where dvc.yaml has it")

    @torch.no_grad()
    def draw(self, model: ARTransformer) -> Image.Image | None:
        """The picture, a row for each class, named if there are several; None on other ranks than 0. A collective call.

        Args:
            model: in evaluation mode, on the device; draws change no generator's state.
        """
        labels = np.arange(self.num_images) % len(self.class_names)
        codes = Generator(model).generate(labels, self.guidance, self.seed)
        if self.tokenizer is None:
            return None
        images = to_uint8(self.tokenizer.decode(codes.to(self.world.device))).cpu().numpy()
        classes = np.unique(labels)
        names = [self.class_names[label] for label in classes] if len(self.class_names) > 1 else None
        return image_grid([images[labels == label] for label in classes], names)


def find_tokenizer(run: StageRun) -> Path | None:
    """The folder of the tokenizer that made the codes, by its content: where dvc.yaml has it, or beside the cache.

    None if it is at neither place, or unknown. What else lies there, perhaps incomplete, is no concern of the run.
    """
    made_by = run.manifests["tokenize"].inputs.get("train_tokenizer")
    if made_by is None:  # codes that were imported
        return None
    wanted = made_by["content"]
    usual = Path(load_stages()["train_tokenizer"].output)
    for folder in (run.inputs["tokens"].parent / usual.name, usual):
        with suppress(UserError):
            if (folder / "manifest.json").exists() and content_of(folder) == wanted:
                return folder
    return None
