"""A-TPT: attention-guided views, prompt tuning, reliability by the maps' total variation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

import torch

from ..functional import entropy, reliability_weights, total_variation
from ..views import mix_views, region_map
from .options import AtLeast, Flag, OneOf, Positive, Share
from .prompt_tuning import PromptTuning, agreement, settle_drop_self
from .view_ensemble import ensemble_log_probabilities, sharpen, upsampled


@dataclass(frozen=True)
class ATPT(PromptTuning):
    """Attention-guided test-time prompt tuning, for images under attack.

    Every view keeps its pixels where the model attends, and takes those of an augmented copy
    elsewhere. The prompt is tuned on the most confident views. In the prediction, views with
    smoother attention have larger weights.

    Args:
        views, select, lr, weight_decay, prompt, prompt_length: as in ``TPT``.
        rollout: attention map. ``"code"``: the official code's; ``"paper"``: the paper's formula;
            ``"gar"``: plain gradient attention rollout over all layers. ResNets have Grad-CAM.
        mask: ``"quantile"``: pixels above a quantile (code); ``"top"``: an exact count (paper).
        high, low: shares of the pixels of high and of low attention; the rest, if any, is mixed
            with the view's AugMix weight.
        mix_high, mix_low: weight of the view's pixels there.
        base_view: ``"crop"``: random resized crops and flips (code); ``"flip"``: the flipped
            centre crop (paper).
        ensemble: ``"tv"``: probabilities of the selected views, weights softmax(-total variation
            / tv_temperature) (paper); ``"similarity"``: R-TPT's logits of all views (code);
            ``"mean"``: of the selected views, all alike.
        tv_map: ``"grid"``: variation of the G x G map; ``"pixel"``: of the upsampled one (paper
            to the letter; it saturates to one view).
        tv_loss: also weight the selected views' entropies in the loss.
        cam_sharpen: threshold that Grad-CAM maps are cut at, for masks.
        neighbours, similarity_temperature, drop_self: of ``"similarity"``, as in ``RTPT``.

    ``losses``: ``"entropy"`` of the selected views, ``"total"``. ``stats``: ``"attention"`` [N, G,
    G], ``"region"`` uint8 [N, R, R] (2 high, 1 between, 0 low), ``"tv"`` [N] (these three where
    attention was computed; if the region is an argument, only the ensemble and tv_loss need it),
    ``"selected"``, ``"weights"`` [N] (0 where not selected), ``"prompt"`` [n_ctx, D].
    ``.logits`` are log-probabilities for ``"tv"`` and ``"mean"``, weighted logits else.

    Source: A-TPT (ICML 2026) and its official code, which differ. Presets ``"code"`` and
    ``"paper"`` are the two to the letter. The default is the code's map, masks and views, with
    the paper's ensemble on the grid: total variation at pixel resolution picks a single view, and
    the code's similarity ensemble uses no attention. The official code's weights of the last
    block are rounding noise in float32; here they are those of float64. Its refinement runs with
    the prompt of the image before; here every image starts afresh.
    """

    name: ClassVar[str] = "a-tpt"
    captured_by_default: ClassVar[bool] = True
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "code": {"ensemble": "similarity"},
        "paper": {
            "rollout": "paper", "mask": "top", "base_view": "flip", "ensemble": "tv",
            "tv_map": "pixel",
        },
    }  # fmt: skip

    rollout: Annotated[str, OneOf("code", "paper", "gar")] = "code"
    mask: Annotated[str, OneOf("quantile", "top")] = "quantile"
    high: Annotated[float, Share()] = 0.2
    low: Annotated[float, Share()] = 0.8
    mix_high: Annotated[float, Share()] = 0.8
    mix_low: Annotated[float, Share()] = 0.2
    base_view: Annotated[str, OneOf("crop", "flip")] = "crop"
    ensemble: Annotated[str, OneOf("tv", "similarity", "mean")] = "tv"
    tv_map: Annotated[str, OneOf("grid", "pixel")] = "grid"
    tv_temperature: Annotated[float, Positive()] = 1.0
    tv_loss: Flag = False
    cam_sharpen: Annotated[float, Share()] = 0.2
    neighbours: Annotated[int, AtLeast(1)] = field(default=20, kw_only=True)
    similarity_temperature: Annotated[float, Positive()] = field(default=0.01, kw_only=True)
    drop_self: tuple[bool, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high + self.low > 1 + 1e-9:
            raise ValueError(f"high={self.high}, low={self.low}: needed high + low of at most 1")
        settle_drop_self(self)

    @property
    def differentiated_blocks(self) -> int | None:
        """Attention maps are of gradients in the last two blocks, or in all of them ("gar")."""
        return None if self.rollout == "gar" else 2

    def fitted(self, model: Any) -> Self:
        """Checks that the model has attention maps."""
        super().fitted(model)
        model.check_maps()
        return self

    def pixels(self, model, images):
        """Views mixed with their augmented copies where the model does not attend."""
        views, (text,) = images.views, images.text
        regions = [each.region for each in views]
        all_given = all(region is not None for region in regions)
        b, n, features, stats = len(views), len(views[0]), None, {}
        if not all_given or self.ensemble == "tv" or self.tv_loss:
            attention = model.attention_maps(images.joined("base"), text, self.rollout)
            maps = attention.grid
            if all(each.mix.data_ptr() == each.base.data_ptr() for each in views):
                features = attention.features  # without augmentation mixing changes nothing
            stats["attention"] = maps.unflatten(0, (b, n))
            large, size = maps, views[0].resolution
            if self.tv_map == "pixel" or model.map_kind == "grad-cam":
                large = upsampled(maps, size)
            if model.map_kind == "grad-cam":
                large = sharpen(large, self.cam_sharpen)
            stats["tv"] = total_variation(large if self.tv_map == "pixel" else maps)
            stats["tv"] = stats["tv"].unflatten(0, (b, n))
            if not all_given:
                masks = region_map(large, size, self.mask, self.high, self.low).split(n)
                pairs = zip(regions, masks, strict=True)
                regions = [ours if theirs is None else theirs for theirs, ours in pairs]
        stats["region"] = torch.stack(regions)
        if features is not None:
            return images.joined("base"), features, stats
        mixed = [
            mix_views(each, region, self.mix_high, self.mix_low)
            for each, region in zip(views, regions, strict=True)
        ]
        return torch.cat(mixed), None, stats

    def loss_weights(self, stats, selected):
        """Weights by reliability, with ``tv_loss``."""
        return self._weights(stats, selected) if self.tv_loss else None

    def _weights(self, stats, selected):
        return reliability_weights(stats["tv"].gather(1, selected), self.tv_temperature)

    def losses(self, logits, text, weights):
        """Mean entropy of the selected views, weighted with ``tv_loss``."""
        each = entropy(logits)
        value = each.mean(1) if weights is None else (weights * each).sum(1)
        return {"entropy": value, "total": value}

    def combine(self, logits, features, selected, stats):
        """The ensemble of the views that ``ensemble`` names."""
        if self.ensemble == "similarity":
            return agreement(self, logits, features, self.similarity_temperature)
        part = torch.full_like(selected, 1, dtype=logits.dtype) / selected.shape[1]
        if self.ensemble == "tv":
            part = self._weights(stats, selected)
        weights = torch.zeros_like(logits[..., 0]).scatter(1, selected, part)
        return ensemble_log_probabilities(logits, weights), weights
