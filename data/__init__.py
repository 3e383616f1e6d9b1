"""From image files to batches: any source -> a list of images -> decoded pixels -> crops -> views."""

from data.cache import CropCache, open_cache
from data.crops import (
    VOID,
    Transform,
    central_crop,
    colours_and_mask,
    fitted,
    masked_crop,
    probe_train_crop,
    segmentation_side,
    ten_crops,
    train_crop,
    voc_train_crop,
    whole_image,
)
from data.decode import EXTENSIONS, FORMATS, ImageError, decode_file
from data.depth import find_bits
from data.images import ImageList, PackedPaths, classes_of, list_images
from data.sources import (
    broken_reason,
    cannot_decode,
    check_headers,
    leave_out,
    list_source,
    look_at,
    open_images,
    reasons,
    refuse_overwriting,
)
from data.views import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Batch,
    PlainView,
    RandomView,
    init_worker,
    make_loader,
    mirrored,
    normalise,
    seeded,
    to_input,
    turned,
)

__all__ = [
    "EXTENSIONS", "FORMATS", "IMAGENET_MEAN", "IMAGENET_STD", "VOID", "Batch", "CropCache", "ImageError",
    "ImageList", "PackedPaths", "PlainView", "RandomView", "Transform", "broken_reason", "cannot_decode",
    "central_crop", "check_headers", "classes_of", "colours_and_mask", "decode_file", "find_bits", "fitted",
    "init_worker", "leave_out", "list_images", "list_source", "look_at",
    "make_loader", "masked_crop", "mirrored", "normalise", "open_cache", "open_images", "probe_train_crop",
    "reasons", "refuse_overwriting", "seeded", "segmentation_side", "ten_crops", "to_input", "train_crop",
    "turned", "voc_train_crop", "whole_image",
]  # fmt: skip
