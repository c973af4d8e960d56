"""The methods of a pipeline that load Redux and IP-Adapters, with the names of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flux_batch.download.models import PathOrFolder
from flux_batch.model.optimize.cuda_graphs import CudaGraphs
from flux_batch.model.optimize.dtypes import without_autocast
from flux_batch.pipeline.errors import device_errors
from flux_batch.pipeline.images.prompts import AdapterScale, ImagePrompts, adapter_files
from flux_batch.sampling_params import check_cuda_graphs


class ImagePromptLoaders:
    """The part of a pipeline that loads models for image prompts: Redux and IP-Adapters."""

    image_prompts: ImagePrompts
    graphs: CudaGraphs | None

    def load_redux(self, uri: PathOrFolder, image_encoder: PathOrFolder | None = None, scale: float = 1.0) -> None:
        """Load a FLUX.1-Redux with its vision tower, SigLIP, for calls with image prompts.

        uri: its file, or the folder or repository that holds it as flux1-redux-dev.safetensors or `image_embedder`.
        image_encoder: the file or folder of the tower; None is the folder `image_encoder` beside it. scale: a factor of
        every image's weight. Raises: CheckpointError; StoreError; InvalidSetting.
        """
        self.image_prompts.load_redux(uri, image_encoder, scale)

    def load_ip_adapter(
        self,
        uri: PathOrFolder | Sequence[PathOrFolder],
        weight_name: str | Sequence[str] | None = None,
        subfolder: str | Sequence[str] | None = None,
        image_encoder_pretrained_model_name_or_path: PathOrFolder | None = None,
        image_encoder_subfolder: str | None = None,
        *,
        image_encoder: PathOrFolder | None = None,
        scale: AdapterScale = 1.0,
    ) -> None:
        """Load one or several IP-Adapters of XLabs with their vision tower, CLIP-L.

        They replace those that were loaded before; the effects of several add up. uri, weight_name, subfolder: the
        file, or a folder or repository and the file in it; lists for several IP-Adapters. image_encoder, or diffusers'
        longer names for it: the file, folder or repository of the tower, openai/clip-vit-large-patch14; None is the
        folder `image_encoder` beside the adapter. scale: see `set_ip_adapter_scale`.
        Raises: CheckpointError, also for a pickle such as InstantX's; StoreError; InvalidSetting.
        """
        check_cuda_graphs(self.graphs is not None, 0, has_ip_adapter=True)
        encoder = image_encoder or image_encoder_pretrained_model_name_or_path
        files = adapter_files(uri, weight_name, subfolder)
        self.image_prompts.load_ip_adapters(files, encoder, scale, image_encoder_subfolder)

    def set_ip_adapter_scale(self, scale: AdapterScale) -> None:
        """Set the strength of the IP-Adapter: one number, or one for each double block.

        For several IP-Adapters, pass one of these for each. Raises: InvalidSetting.
        """
        self.image_prompts.set_scale(scale)

    def unload_ip_adapter(self) -> None:
        """Unload the IP-Adapters and their vision tower."""
        self.image_prompts.ip_adapters = []

    def prepare_ip_adapter_image_embeds(self, ip_adapter_image: Any) -> list[Tensor]:
        """Return the embeddings of images, for calls with `ip_adapter_image_embeds`: (1, k, e) for each IP-Adapter.

        ip_adapter_image: the images of one prompt. Raises: InvalidSetting; OutOfMemory; DeviceFatal.
        """
        with torch.inference_mode(), without_autocast(), device_errors():
            return self.image_prompts.embeds(ip_adapter_image)
